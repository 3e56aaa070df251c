#!/usr/bin/env bash
# Everything that is checked, on a bare machine: environment, format, lint, types, tests.
#
#   bash launch/test.sh           fast tests
#   bash launch/test.sh --full    the slow ones as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks="not full"
case "${1-}" in
    "") ;;
    --full) marks="full or not full" ;;
    *) echo "usage: bash launch/test.sh [--full]" >&2; exit 2 ;;
esac

source launch/venv.sh

# Installation is skipped where the requirements are those installed last.
wanted=$(cat requirements.txt pyproject.toml | sha256sum)
stamp=$venv/requirements.sha256
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing into $venv"
    "$python" -m pip install --quiet --upgrade pip
    "$python" -m pip install --quiet --editable '.[dev]'
    # See [export] in pyproject.toml.
    "$python" -m pip install --quiet --no-deps 'jax2onnx>=0.17,<0.18'
    echo "$wanted" >"$stamp"
fi

echo "== format and lint"
"$python" -m ruff format --check .
"$python" -m ruff check .
echo "== types"
"$python" -m basedpyright
echo "== tests"
SECONDS=0
"$python" -m pytest -q -m "$marks" -n 2 --dist worksteal \
    --durations=15
echo "== all passed; the tests took $SECONDS s"
