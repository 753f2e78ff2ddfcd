#!/usr/bin/env bash
# Restarts a command until it is done, with longer and longer pauses.
#
#   bash launch/restart.sh COMMAND...
#
# Exit codes that restart it: 75 stopped by a signal, 76 a peer was lost, 137 killed, 143 terminated. Others are passed on: 0 is
# done; 2 (wrong config), 3 (bad data) and 4 (diverged) would only happen again. A signal to this script (Ctrl-C too) ends the
# command with SIGTERM and without a restart: whoever sent it wants it to end. RESTARTS (default 20): the maximum. BACKOFF
# (default 5): seconds before the first, doubled each time up to 300; a run that lasted ten minutes resets the pause.
set -uo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^set /{/^#/s/^#\{1,\} \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2; exit 2; }

# shellcheck source=launch/numbers.sh
source "$(dirname "${BASH_SOURCE[0]}")/numbers.sh"
whole_number RESTARTS 20
whole_number BACKOFF 5
restarts=$RESTARTS pause=$BACKOFF child='' ended='' heard=''
# SIGTERM for SIGINT too: a script's background process ignores SIGINT until it installs a handler, which training does late.
pass_on() {
  ended=1 heard=1
  if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null; fi
}
trap pass_on TERM INT

# Runs a command to its end and leaves its exit code in `code`.
attend() {
  "$@" &
  child=$!
  if [[ -n "$ended" ]]; then kill -TERM "$child" 2>/dev/null; fi # signalled before there was a child to pass it on to
  heard=1
  while [[ -n "$heard" ]]; do # a signal ends `wait`, not the command
    heard=
    wait "$child"
    code=$?
  done
  child=''
}

while :; do
  begun=$SECONDS
  attend "$@"
  case $code in
    75 | 76 | 137 | 143) ;;
    *) exit "$code" ;;
  esac
  [[ -z "$ended" ]] || exit "$code"
  if ((restarts-- == 0)); then
    echo "restart.sh: exit code $code, and no restart left (RESTARTS=$RESTARTS)" >&2
    exit "$code"
  fi
  ((SECONDS - begun < 600)) || pause=$BACKOFF
  echo "restart.sh: exit code $code, again in $pause s" >&2
  last=$code
  attend sleep "$pause"
  [[ -z "$ended" ]] || exit "$last"
  pause=$((pause * 2 > 300 ? 300 : pause * 2))
done
