# shellcheck shell=bash
# Sourced by the scripts that start something again: checks numbers that come from the environment.

# whole_number NAME DEFAULT: sets the variable NAME to DEFAULT where it is empty; ends the script where it is no whole number.
# In base 10: to bash's arithmetic 08 is a mistake, and 010 is 8.
whole_number() {
  local value=${!1:-$2}
  if [[ ! "$value" =~ ^[0-9]{1,9}$ ]]; then
    echo "${0##*/}: $1=$value: expected a whole number" >&2
    exit 2
  fi
  printf -v "$1" %d "$((10#$value))"
}
