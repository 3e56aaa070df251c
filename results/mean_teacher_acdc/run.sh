#!/usr/bin/env bash
# bash results/mean_teacher_acdc/run.sh NAME METHOD SEED [--config.a.b=VALUE ...]
#
# Trains one run of this folder from the project's root, or goes on with it:
#   supervised_SEED   supervised SEED
#   mean_teacher_SEED mean_teacher SEED
#   old_0             mean_teacher 0 --config.mpmc.alpha=1 --config.method.rampup=0
#                     --config.method.normalization=joint --config.method.unlabeled_loss=ce
# $DATA is what launch.prepare_data made of ACDC, $LISTS its folder of published lists.
set -euo pipefail
name=$1 method=$2 seed=$3
shift 3
python -m launch.train \
  --config="configs/acdc.py:method=$method,split=3,lists=${LISTS:-ACDC/splits},crop=96" \
  --config.data.data_dir="${DATA:-data}" --config.seed="$seed" \
  --config.train.batch_size=8 --config.train.group_size=8 --config.train.steps=300 \
  --config.train.eval_every=300 --config.train.checkpoint_every=300 \
  --config.train.precise_bn=20 --config.optimizer.lr=0.05 --config.method.ema_decay=0.97 \
  "$@" --workdir="runs/mean_teacher_acdc/$name"
