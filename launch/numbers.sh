# shellcheck shell=bash
# Sourced by the scripts that restart something: checks numbers from the environment.

# whole_number NAME DEFAULT: sets the variable NAME to DEFAULT if it is empty; ends the script if it is not a whole number.
# Base 10 is explicit: bash's arithmetic rejects 08 and reads 010 as 8.
whole_number() {
  local value=${!1:-$2}
  if [[ ! "$value" =~ ^[0-9]{1,9}$ ]]; then
    echo "${0##*/}: $1=$value: expected a whole number" >&2
    exit 2
  fi
  printf -v "$1" %d "$((10#$value))"
}
