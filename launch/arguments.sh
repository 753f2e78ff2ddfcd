# shellcheck shell=bash
# Sourced first, under bash's -euo pipefail, by scripts called as SCRIPT [WORKDIR] [-- TRAIN_FLAGS...]: sets workdir to an
# absolute path or leaves it empty, and leaves the flags as arguments. --help prints the header comment of the script.

usage() {
  sed -n '2,/^set /{/^#/s/^#\{1,\} \{0,1\}//p;}' "$0"
  exit "$1"
}

workdir=
if [[ $# -gt 0 && "$1" != -- ]]; then
  case "$1" in
    -h | --help) usage 0 ;;
    -*) usage 2 >&2 ;;
    /* | *://*) workdir=$1 ;;
    *) workdir=$PWD/$1 ;;
  esac
  shift
fi
if [[ $# -gt 0 ]]; then
  [[ "$1" == -- ]] || usage 2 >&2
  shift
fi
