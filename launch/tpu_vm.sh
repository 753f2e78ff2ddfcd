#!/usr/bin/env bash
# A Cloud TPU slice without Kubernetes: creates it, copies the repository, trains on all its workers, restarts until done.
#
#   TPU=NAME ZONE=us-east5-a TYPE=v5p-16 bash launch/tpu_vm.sh [--dry-run] TRAIN_FLAGS...
#
# TRAIN_FLAGS, for example: --config=configs/gpt4o.py:small --workdir=gs://BUCKET/runs/small
# WORKDIR must be gs://: the workers share no other storage. A preempted spot slice is created again, whatever was running on it.
# --dry-run prints each command and runs none. VERSION (default: the one for TYPE), SPOT=1, PROJECT: passed to gcloud.
# RESTARTS (default 20): the maximum. BACKOFF (default 10): seconds before the first, doubled each time up to 300; training
# that lasted ten minutes resets the pause.
# Ctrl-C ends this script, not the training on the workers: the same command stops that and continues from where it saved.
# The slice is left running, and costs money, until
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^#/s/^#\{1,\} \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit "$1"
}
dry_run=
case "${1:-}" in
  -h | --help) usage 0 ;;
  --dry-run) dry_run=1 && shift ;;
esac
[[ $# -gt 0 && -n "${TPU:-}" && -n "${ZONE:-}" && -n "${TYPE:-}" ]] || usage 2 >&2
case " $*" in
  *" --dry-run"*) echo 'tpu_vm.sh: --dry-run comes first, before the flags of train' >&2 && exit 2 ;;
  *" --workdir=gs://"* | *" --workdir gs://"*) ;;
  *) echo 'tpu_vm.sh: --workdir=gs://... is missing: the workers share no other storage' >&2 && exit 2 ;;
esac

# shellcheck source=launch/numbers.sh
source "$(dirname "${BASH_SOURCE[0]}")/numbers.sh"
whole_number RESTARTS 20
whole_number BACKOFF 10

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=("$TPU" "--zone=$ZONE")
if [[ -n "${PROJECT:-}" ]]; then where+=("--project=$PROJECT"); fi

run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}
ssh_all() { run gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command="$1"; }
state() { [[ -z "$dry_run" ]] && gcloud compute tpus tpu-vm describe "${where[@]}" --format='value(state)' 2>/dev/null || true; }

# From https://cloud.google.com/tpu/docs/runtimes
version() {
  case "$TYPE" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
  esac
}
VERSION=${VERSION:-$(version)}
[[ -n "$VERSION" ]] || { echo "tpu_vm.sh: TYPE=$TYPE: set VERSION to the TPU software version for it" >&2 && exit 2; }

make_slice() {
  local made
  made=$(state)
  [[ "$made" != READY ]] || return 0
  if [[ -n "$made" ]]; then run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet || return; fi # preempted, so unusable
  local how=("--accelerator-type=$TYPE" "--version=$VERSION")
  if [[ -n "${SPOT:-}" ]]; then how+=(--spot); fi
  run gcloud compute tpus tpu-vm create "${where[@]}" "${how[@]}"
}

copy_repository() {
  local archive code=0
  archive=$(mktemp) # without a suffix, which only GNU's takes
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "${where[@]/#$TPU/$TPU:gpt4o_jax.tar.gz}" --worker=all || code=$?
  rm -f "$archive"
  ((code == 0)) || return "$code"
  # The machines come with Python 3.10 and without uv, which fetches a newer one.
  ssh_all 'set -euo pipefail; mkdir -p gpt4o_jax; tar -xzf gpt4o_jax.tar.gz -C gpt4o_jax; cd gpt4o_jax; export PATH="$HOME/.local/bin:$PATH"; source launch/environment.sh; find_python >/dev/null || command -v uv >/dev/null || python3 -m pip install --quiet --user uv; prepare_environment requirements-tpu.txt'
}

flags=$(printf ' %q' "$@")
had='' # whether there was a slice, which may be lost
attempt() {
  make_slice || return
  had=1
  copy_repository || return
  begun=$SECONDS
  # JAX_PLATFORMS: or JAX would train on the CPU if the TPU failed to start.
  ssh_all "cd gpt4o_jax && JAX_PLATFORMS=tpu,cpu bash launch/alone.sh .venv/train.pid .venv/bin/python -m gpt4o_jax train$flags"
}
lost() { [[ -n "$had" && "$(state)" != READY ]]; }

pause=$BACKOFF
for ((left = RESTARTS; ; left--)); do
  code=0 begun='' # set by training only: a slice may take as long to come, or never come
  attempt || code=$? # `||` disables `set -e` within it
  case $code in
    75 | 76 | 137 | 143 | 255) ;; # 255: ssh lost the worker
    0) exit 0 ;;
    *) lost || exit "$code" ;;
  esac
  if ((left == 0)); then exit "$code"; fi
  [[ -z "$begun" ]] || ((SECONDS - begun < 600)) || pause=$BACKOFF
  echo "tpu_vm.sh: exit code $code, again in $pause s" >&2
  sleep "$pause"
  pause=$((pause * 2 > 300 ? 300 : pause * 2))
done
