#!/usr/bin/env bash
# Trains or evaluates on a SLURM cluster, a process a GPU; JAX finds the others from
# SLURM.
#
#   bash launch/slurm.sh --nodes=2 --gpus_per_node=4 [--dry_run] [SBATCH OPTIONS] \
#       -- launch.train --config=configs/cityscapes.py --workdir=/shared/runs/city
#
# What stands before the -- and is not listed above goes to sbatch as it is: --time,
# --partition, --account. The job asks for SIGTERM two minutes before its time ends
# (--signal=TERM@600: ten), saves, and is queued again until its program ends by itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh

answer_help "$@"
nodes=1 gpus=1 dry_run='' options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=*) gpus=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --nodes | -N* | -n | --ntasks* | --gpus* | -G* | --gres*)
      fail "$1: say --nodes=NUMBER and --gpus_per_node=NUMBER, from which the rest follows"
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
if [ $# -lt 2 ]; then
  usage
fi
shift
check_program "$1"
for number in "$nodes" "$gpus"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes --gpus_per_node=$gpus: whole numbers from 1 on"
done
if [ -z "$dry_run" ] && ! command -v sbatch >/dev/null; then
  fail "sbatch is not on this machine; log in to the cluster, or say --dry_run"
fi

python=${MPMC_VENV:-.venv}/bin/python
if [ -z "$dry_run" ] && [ ! -x "$python" ]; then
  fail "$python does not exist; make the environment first (README, Two commands)"
fi

# 75 is what a program leaves with after a signal: it has saved, and may go on. srun
# must not end the slower processes of a job whose first one has left so.
program=$(printf ' %q' "$python" -m "$@")
script="#!/usr/bin/env bash
cd $(printf %q "$PWD")
srun --kill-on-bad-exit=0$program
status=\$?
if [ \$status -eq 75 ]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$status"
submit=(
  sbatch --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
  --requeue --signal=TERM@120 --open-mode=append ${options[@]+"${options[@]}"}
)
if [ -n "$dry_run" ]; then
  run "${submit[@]}"
  printf '%s\n' "$script"
else
  printf '%s\n' "$script" | run "${submit[@]}"
fi
