"""Curves and a table of finished runs; needs matplotlib.

python -m launch.compare --output=results/camvid_cpu runs/supervised runs/unimatch

Writes curves.png and table.md, and of each run its config.json, manifest.json,
metrics.jsonl, evaluations and trust figures, under OUTPUT/<run>.
"""

import argparse
import shutil
import sys
from pathlib import Path

from mpmc_jax.analysis import curves

KEPT = ("config.json", "manifest.json", "metrics.jsonl", "eval_*.json", "trust_*.json")
NUMBERS = ("val/miou", "train/loss_supervised")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("runs", nargs="+", help="directories of runs")
    args = parser.parse_args(arguments)
    directories = {Path(run).name: Path(run) for run in args.runs}
    if len(directories) < len(args.runs):
        sys.exit("error: two runs have the same name; their results would collide")
    output = Path(args.output)
    try:
        lines = {
            name: curves.read_metrics(directory / "metrics.jsonl")
            for name, directory in directories.items()
        }
        output.mkdir(parents=True, exist_ok=True)
        curves.draw(lines, NUMBERS, output / "curves.png")
        (output / "table.md").write_text(curves.table(lines))
        for name, directory in directories.items():
            (output / name).mkdir(exist_ok=True)
            for pattern in KEPT:
                for path in directory.glob(pattern):
                    shutil.copy(path, output / name / path.name)
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"error: {error}")
    print((output / "table.md").read_text())


if __name__ == "__main__":
    main()
