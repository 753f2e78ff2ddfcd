#!/usr/bin/env bash
# One training run in several processes on this machine, restarted until it is done.
#
#   bash launch/local.sh N TRAIN_FLAGS...     for example: bash launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# With GPUs, each process gets an equal share of them, or of those named by CUDA_VISIBLE_DEVICES: N must divide their number.
# Without GPUs, or with JAX_PLATFORMS=cpu, the processes share the CPU: good for trying out what a pod does. When one process
# ends, so do the others; launch/restart.sh lists the exit codes that restart them. PORT: the coordinator's (default: a free
# one). N=1 is the plain command.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^#/s/^#\{1,\} \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit "$1"
}
case "${1:-}" in
  -h | --help) usage 0 ;;
  '' | *[!0-9]* | 0*) usage 2 >&2 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ "${LOCAL_ONCE:-}" != 1 ]]; then
  LOCAL_ONCE=1 exec bash "$here/restart.sh" bash "$here/local.sh" "$@"
fi
n=$1
shift
root=$(dirname "$here")
python=$root/.venv/bin/python
[[ -x "$python" ]] || python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
gpus=() told='' # by number or UUID
count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
[[ "${JAX_PLATFORMS:-}" != cpu ]] || count=0
if ((count > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
  told="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: "
  for gpu in ${CUDA_VISIBLE_DEVICES//,/ }; do
    [[ "$gpu" != -1 ]] || break # CUDA ignores all devices after it
    gpus+=("$gpu")
  done
else
  for ((i = 0; i < count; i++)); do gpus+=("$i"); done
fi
if ((${#gpus[@]} % n)); then
  echo "local.sh: $told${#gpus[@]} GPU(s) cannot be shared by $n processes; nearest: 1 or ${#gpus[@]}" >&2
  exit 2
fi
each=$((${#gpus[@]} / n))
if ((each > 0)); then
  XLA_FLAGS=$("$python" "$root/launch/xla_flags.py" cuda)
  export XLA_FLAGS JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # or JAX would train on the CPU if CUDA failed to start
fi

pids=() ended='' heard=''
# SIGTERM for SIGINT too: a script's background process ignores SIGINT until it installs a handler, which training does late.
end_all() {
  local pid
  ended=1 heard=1
  for pid in ${pids[@]+"${pids[@]}"}; do kill -TERM "$pid" 2>/dev/null || true; done
}
trap end_all TERM INT

# ${share[@]+...}: the bash of macOS (3.2) treats an empty array as unset.
for ((i = 0; i < n; i++)); do
  share=()
  if ((each > 0)); then
    part=("${gpus[@]:i * each:each}")
    share=(env "CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${part[*]}")")
  fi
  job=()
  if ((n > 1)); then job=("--coordinator=127.0.0.1:$port" "--num_processes=$n" "--process_id=$i"); fi
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" ${share[@]+"${share[@]}"} "$python" -m gpt4o_jax train "$@" ${job[@]+"${job[@]}"} &
  pids+=($!)
done

[[ -z "$ended" ]] || end_all # signalled before all had started

# The job exits with the most informative code of its processes: a mistake (2 to 5) over a stop, a stop over a lost peer.
worst=0 rank=0
for pid in ${pids[@]+"${pids[@]}"}; do
  heard=1
  while [[ -n "$heard" ]]; do # a signal ends `wait`, not the process
    heard='' code=0
    wait "$pid" || code=$?
  done
  case $code in 0) r=0 ;; 76) r=1 ;; 137 | 143) r=2 ;; 75) r=3 ;; *) r=4 ;; esac
  if ((r > rank)); then worst=$code rank=$r; fi
done
exit "$worst"
