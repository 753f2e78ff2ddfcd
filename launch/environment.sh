# shellcheck shell=bash
# Sourced by the other scripts under bash's -euo pipefail: changes to the root of the repository and defines
#
#   runtime_requirements     prints the requirements file for this machine: cuda, tpu, or the core alone
#   prepare_environment F... creates .venv if it is missing, and installs the requirements files F and this package;
#                            does nothing if they are unchanged since the last install. A failure ends the script,
#                            even without -e: a partial install must not count as done
#
# PYTHON=PROGRAM chooses the interpreter that creates .venv.

CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

runtime_requirements() {
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo requirements-cuda.txt
  elif compgen -G '/dev/accel[0-9]*' >/dev/null ||
    { compgen -G '/dev/vfio/[0-9]*' >/dev/null && [[ -n "${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}" ]]; }; then
    echo requirements-tpu.txt
  else
    echo requirements.txt
  fi
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local python=${PYTHON:-}
  if [[ -n "$python" ]] && ! is_new_enough "$python"; then
    fail "PYTHON=$python: expected a Python of version 3.11 or newer"
  elif [[ -n "$python" ]] || python=$(find_python); then
    if command -v uv >/dev/null; then
      uv venv --quiet --clear --python "$python" .venv || fail "uv cannot make .venv with $python, see above"
    else
      "$python" -m venv --clear .venv || fail "$python cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
    fi
  elif command -v uv >/dev/null; then
    # uv provides its own interpreter
    uv venv --quiet --clear --python 3.12 .venv || fail 'uv cannot make .venv with a Python 3.12 of its own, see above'
  else
    fail 'no Python 3.11 or newer found (tried python3, python3.13, python3.12, python3.11, python); install one, or set PYTHON=PROGRAM'
  fi
}

# Changes with any requirements file, the package's metadata, the interpreter or the path of the repository.
environment_key() (
  set -o pipefail
  { cat requirements*.txt pyproject.toml && .venv/bin/python -VV && pwd -P; } | cksum
)

install_packages() {
  if command -v uv >/dev/null; then
    uv pip install --quiet --python .venv/bin/python "$@"
  else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
  fi || fail "cannot install $* into $PWD/.venv, see above; the same command tries again"
}

prepare_environment() {
  is_new_enough .venv/bin/python || make_venv
  local key file missing=()
  key=$(environment_key) || fail "$PWD: its requirements files, pyproject.toml or .venv cannot be read, see above"
  for file in "$@"; do
    if [[ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$key" ]]; then
      missing+=(-r "$file")
    fi
  done
  if ((${#missing[@]})); then
    echo "installing $* into $PWD/.venv" >&2
    if ! command -v uv >/dev/null && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      .venv/bin/python -m ensurepip >/dev/null || fail "$PWD/.venv has no pip; on Debian and Ubuntu: apt install python3-venv"
    fi
    install_packages "${missing[@]}"
    install_packages --no-deps --editable .
    for file in "$@"; do
      printf '%s\n' "$key" >".venv/installed-$file" || fail "$PWD/.venv/installed-$file cannot be written"
    done
  fi
}
