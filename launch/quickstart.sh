#!/usr/bin/env bash
# From an empty machine to a trained UniMatch + MPMC on procedural scenes, in minutes.
#   bash launch/quickstart.sh [WORKDIR]        needs Python 3.11 to 3.13 and pip
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/shell.sh
answer_help "$@"
workdir=${1:-runs/quickstart}
target=0.40

source launch/venv.sh
"$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt

"$python" -m launch.prepare_data --dataset=synthetic --data_dir=data
"$python" -m launch.train --workdir="$workdir" \
  --config=configs/synthetic.py:method=unimatch,mpmc=recommended,backbone=resnet18,split=1_16
"$python" -m launch.evaluate --workdir="$workdir" --checkpoint=best
"$python" -m launch.experiments --name=panels --output="$workdir/figures" "$workdir"

"$python" - "$workdir/eval_val_best.json" "$target" <<'PYTHON'
import json
import sys

path, target = sys.argv[1], float(sys.argv[2])
found = json.load(open(path))["scalars"]
checks = {
    "val/miou": (found["miou"], target),
    "patch Hamming accuracy": (found["patch_hamming"], found["patch_hamming_constant"]),
    "patch mean average precision": (found["patch_map"], found["patch_map_constant"]),
}
for name, (value, bar) in checks.items():
    print(f"{name}: {value:.3f}, must exceed {bar:.3f}")
# So written that a NaN fails.
sys.exit(not all(value > bar for value, bar in checks.values()))
PYTHON
echo "Images, truth and predictions: $workdir/figures/panels.png"
