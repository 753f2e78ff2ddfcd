#!/usr/bin/env bash
# Runs a command once what an earlier call with the same PIDFILE left running has ended.
#
#   bash launch/alone.sh PIDFILE COMMAND...
#
# For machines that are reached by ssh: what was started there outlives a connection that is lost, and holds the TPU. SIGTERM lets
# training save; after two minutes it is killed.
set -uo pipefail

file=$1
shift
left=$(cat "$file" 2>/dev/null)
# By its command line too: after a restart of the machine the number may be another's.
if [[ -n "$left" ]] && tr '\0' ' ' 2>/dev/null <"/proc/$left/cmdline" | grep -q gpt4o_jax; then
  echo "alone.sh: process $left still runs; it is stopped" >&2
  kill -TERM "$left"
  for ((i = 0; i < 1200; i++)); do
    kill -0 "$left" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$left" 2>/dev/null
fi
echo $$ >"$file" || exit 5
exec "$@"
