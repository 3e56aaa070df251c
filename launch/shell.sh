# Sourced by the launchers: says or runs commands, and ends with one line.

# Prints a command as one could type it.
show() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# Shows a command, and runs it unless $dry_run is set.
run() {
  show "$@"
  if [ -z "${dry_run-}" ]; then
    "$@"
  fi
}

# As `run`, in the shell's own place: signals then reach the command, and its status is
# the shell's.
become() {
  show "$@"
  if [ -z "${dry_run-}" ]; then
    exec "$@"
  fi
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# The comment at a script's head is its help.
show_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/${0##*/}"
}

usage() {
  show_help >&2
  exit 2
}

# Answers --help, wherever it stands before the program; the arguments are the script's.
answer_help() {
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
      launch.*) return ;;
      -h | --help)
        show_help
        exit 0
        ;;
    esac
    shift
  done
}

# Only these know of other processes; another program would do all of it in each.
check_program() {
  case $1 in
    launch.train | launch.evaluate) ;;
    *) fail "$1: launch.train and launch.evaluate run on several processes" ;;
  esac
}
