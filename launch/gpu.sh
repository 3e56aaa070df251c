#!/usr/bin/env bash
# Runs a program on this machine's GPUs, all of them unless CUDA_VISIBLE_DEVICES says
# which: one process, pmapped over them.
#
#   bash launch/gpu.sh [--dry_run] launch.train --config=configs/voc.py:split=92 --workdir=runs/voc
#
# The environment is .venv (or $MPMC_VENV), with jax[cuda12] added if it sees no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh

answer_help "$@"
dry_run=
if [ "${1-}" = --dry_run ]; then
  dry_run=yes
  shift
fi
if [ $# -eq 0 ]; then
  usage
fi
[[ $1 == launch.* ]] || fail "$1: a program is needed, launch.train or another launch.*"

if [ -z "$dry_run" ]; then
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi --list-gpus | grep -q .; then
    fail "nvidia-smi finds no GPU on this machine; without one call python -m $1 itself"
  fi
fi
source launch/venv.sh
run "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
if [ -n "$dry_run" ] || ! "$python" -c 'import jax; jax.devices("gpu")' 2>/dev/null; then
  run "$python" -m pip install --quiet --disable-pip-version-check \
    'jax[cuda12]>=0.10.2,<0.13'
fi
become "$python" -m "$@"
