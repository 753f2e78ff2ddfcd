#!/usr/bin/env bash
# One model for four applications and chat: pre-training, fine-tuning on all worlds together, evaluation.
#
#   bash launch/applications.sh [WORKDIR] [-- TRAIN_FLAGS...]
#
# WORKDIR: the folder of the two runs, base and tuned (default: runs/applications in the repository). A second call continues
# where the first stopped and skips what is finished. TRAIN_FLAGS go to both training runs, for example:
# -- --config.train.length='20 steps'
set -euo pipefail

# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${workdir:=$PWD/runs/applications}"
python=$PWD/.venv/bin/python
applications=qa,translation,summarisation,generation,chat

prepare_environment "$(runtime_requirements)" requirements-eval.txt
"$python" -m gpt4o_jax train --config=configs/applications.py:pretrain --workdir="$workdir/base" "$@"
"$python" -m gpt4o_jax train --config=configs/applications.py:tune --workdir="$workdir/tuned" \
  --config.init.from="$workdir/base" "$@"
"$python" -m gpt4o_jax evaluate --workdir="$workdir/tuned" --tasks="$applications"

quoted_workdir=$(printf '%q' "$workdir")
cat >&2 <<END

Done. Learning curves:  $workdir/tuned/report.md
      scores, answers:  $workdir/tuned/evaluations/

Talk to it:
  cd $(printf '%q' "$PWD") && source .venv/bin/activate
  python -m gpt4o_jax chat --workdir=$quoted_workdir/tuned --temperature=0
It knows the kinds of sentences that it was trained on, such as: Translate into German: forty-two thousand and ninety-five
or: Hello, I am Xavier.  and then: What is my name?
END
