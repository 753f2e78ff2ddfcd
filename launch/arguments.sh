# shellcheck shell=bash
# Sourced first, with bash's -euo pipefail, by scripts that are called as SCRIPT [WORKDIR] [-- TRAIN_FLAGS...]: sets workdir,
# absolute or empty, and leaves the flags as arguments. --help prints the comment at the head of the script.

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
