# Sourced by the launchers: says or runs commands, and ends with one line.

# Prints a command as one could type it, and runs it unless $dry_run is set.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ -z "${dry_run-}" ]; then
    "$@"
  fi
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# The comment at a script's head is its help.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" >&2
  exit 2
}
