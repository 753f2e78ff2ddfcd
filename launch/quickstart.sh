#!/usr/bin/env bash
# From a fresh clone to a trained, measured model that writes: environment, training, evaluation, samples.
#
#   bash launch/quickstart.sh [WORKDIR] [-- TRAIN_FLAGS...]
#
# WORKDIR: the run folder (default: runs/quickstart in the repository). A second call continues a stopped run and skips a
# finished one. TRAIN_FLAGS, for example: -- --config.train.length='20 steps'
set -euo pipefail

# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${workdir:=$PWD/runs/quickstart}"
python=$PWD/.venv/bin/python

prepare_environment "$(runtime_requirements)"
"$python" -m gpt4o_jax train --config=configs/quickstart.py --workdir="$workdir" "$@"
"$python" -m gpt4o_jax evaluate --workdir="$workdir"
"$python" -m gpt4o_jax generate --workdir="$workdir" --prompt='Return the ' --num_samples=3 --max_new_tokens=60 >/dev/null

# The printed commands can be pasted even if paths contain spaces.
quoted_workdir=$(printf '%q' "$workdir")
cat >&2 <<END

Done. The run:      $workdir
      its report:   $workdir/report.md
      its curve:    $workdir/loss.png

Try next:
  cd $(printf '%q' "$PWD") && source .venv/bin/activate
  python -m gpt4o_jax generate --workdir=$quoted_workdir --prompt='The following example' --temperature=0.5
  python -m gpt4o_jax evaluate --workdir=$quoted_workdir --text=README.md
  python -m gpt4o_jax train --config=configs/quickstart.py --workdir=runs/longer --config.train.length='20 epochs'
END
