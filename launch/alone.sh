#!/usr/bin/env bash
# Runs a command after stopping whatever an earlier call with the same PIDFILE left running.
#
#   bash launch/alone.sh PIDFILE COMMAND...
#
# For machines reached by ssh: a process started there outlives a lost connection and keeps the TPU. SIGTERM lets training save;
# after two minutes it is killed.
set -uo pipefail

file=$1
shift
left=$(cat "$file" 2>/dev/null)
# Check the command line too: after a reboot the PID may belong to another process.
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
