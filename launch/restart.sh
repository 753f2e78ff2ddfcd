#!/usr/bin/env bash
# Runs a command again until it is done, with longer and longer pauses.
#
#   bash launch/restart.sh COMMAND...
#
# Again: 75 stopped by a signal, 76 a peer was lost, 137 killed, 143 terminated. Anything else is passed on: 0 done, 2 wrong
# config, 3 bad data, 4 diverged would only happen again. A signal to this script goes to the command, and then it is not
# run again: whoever sent it wants an end. RESTARTS (default 20): at most so many. BACKOFF (default 5): seconds before the
# first, doubled each time up to 300; a run that lasted ten minutes begins again at the first.
set -uo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^set /{/^#/s/^#\{1,\} \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2; exit 2; }

restarts=${RESTARTS:-20} backoff=${BACKOFF:-5} pause=${BACKOFF:-5} child='' ended=
pass_on() {
  ended=1
  if [[ -n "$child" ]]; then kill "-$1" "$child" 2>/dev/null; fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

while :; do
  begun=$SECONDS
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the command has ended
    wait "$child"
    code=$?
  done
  child=''
  case $code in
    75 | 76 | 137 | 143) ;;
    *) exit "$code" ;;
  esac
  [[ -z "$ended" ]] || exit "$code"
  if ((restarts-- == 0)); then
    echo "restart.sh: exit code $code, and no restart left (RESTARTS=${RESTARTS:-20})" >&2
    exit "$code"
  fi
  ((SECONDS - begun < 600)) || pause=$backoff
  echo "restart.sh: exit code $code, again in $pause s" >&2
  sleep "$pause" &
  child=$!
  wait "$child"
  child=''
  [[ -z "$ended" ]] || exit "$code"
  pause=$((pause * 2 > 300 ? 300 : pause * 2))
done
