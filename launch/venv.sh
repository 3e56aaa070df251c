# Sourced by the other scripts: makes or reuses the virtual environment, sets $python
# and what processes on a CPU profit from. It is .venv, or $MPMC_VENV; made with python3,
# or $PYTHON.
declare -F run >/dev/null || source launch/shell.sh
venv=${MPMC_VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  base=${PYTHON:-python3}
  if ! "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null
  then
    echo "error: $base is $("$base" --version 2>/dev/null || echo absent);" \
      "Python 3.11 to 3.13 is needed: name one in the variable PYTHON" >&2
    exit 2
  fi
  run "$base" -m venv "$venv"
fi
# shellcheck disable=SC2034  # for those who source this
python=$venv/bin/python
# Large pages: the first steps on a CPU are faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
