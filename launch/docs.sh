#!/usr/bin/env bash
# Builds the documentation site; a warning is an error.
#
#   bash launch/docs.sh [--execute] [FOLDER]
#
# FOLDER is build/site unless it is given; open its index.html. --execute also runs the
# notebooks, in some minutes, and shows what they print and draw.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh

answer_help "$@"
if [ "${1-}" = --execute ]; then
  export MPMC_EXECUTE_NOTEBOOKS=1
  shift
fi
[ $# -le 1 ] || usage
folder=${1:-build/site}

source launch/venv.sh
if ! "$python" -c 'import mpmc_jax, myst_nb, sphinx_book_theme' 2>/dev/null; then
  run "$python" -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
fi
# The reference imports the package, and notebooks run programs; neither needs an
# accelerator.
export JAX_PLATFORMS=cpu
PATH=$(cd "$(dirname "$python")" && pwd):$PATH
export PATH
"$python" -m sphinx --quiet --fresh-env --fail-on-warning -c docs . "$folder"
echo "written to $folder"
