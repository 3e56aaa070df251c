"""Draws curves and writes a table of finished runs; needs matplotlib.

python -m launch.plot_runs --output=results/camvid_cpu runs/supervised runs/unimatch

Writes curves.png and table.md, and copies each run's config.json, manifest.json,
metrics.jsonl, eval_*.json and trust_*.json to OUTPUT/<run>. Results of an earlier call
are replaced, and counted.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from launch import cli
from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity
from mpmc_jax.training.workdir import CHECKPOINTS, read_manifest

COPIES = (
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "eval_*.json",
    "trust_*.json",
)
# The figure that runs are compared by: Dice where volumes are scored.
SCORES = ("val/dice", "val/miou")
LOSS = "train/loss_supervised"


def compare(runs: Sequence[Path], output: Path) -> tuple[str, int]:
    """Writes the comparison of `runs` to `output`.

    Returns:
      The table, and how many files of an earlier comparison were replaced.

    Raises:
      ValueError: matplotlib is missing, two runs have one name, a run has no
        evaluation, or the output folder holds a run's own directory.
      OSError: a run does not exist, or the output cannot be written.
    """
    # Only this program draws curves; the others do not need matplotlib.
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("no matplotlib here; run: python -m pip install matplotlib")
    from mpmc_jax.analysis import curves

    directories = {run.absolute().name: run for run in runs}
    if len(directories) < len(runs):
        raise ValueError("two runs have the same name; their results would collide")
    for name, directory in directories.items():
        if (output / name).resolve() == directory.resolve():
            raise ValueError(
                f"--output={output} holds the run {directory} itself, and its files "
                "would be written over; choose another --output"
            )
        if (output / name / CHECKPOINTS).exists():
            raise ValueError(
                f"{output / name} is a run of its own, whose files would be written "
                "over; choose another --output"
            )
    lines = {
        name: curves.read_metrics(directory / "metrics.jsonl")
        for name, directory in directories.items()
    }
    written = {name for run in lines.values() for line in run for name in line}
    score = next((name for name in SCORES if name in written), SCORES[-1])
    drawn = curves.draw(lines, (score, LOSS))
    table = curves.table(lines, score)
    partial = [
        name
        for name, directory in directories.items()
        if read_manifest(directory)["data"].get("partial")
    ]
    if partial:
        table += f"\nOn a partial data set: {', '.join(partial)}\n"
    results = {output / "curves.png": drawn, output / "table.md": table.encode()}
    for name, directory in directories.items():
        for pattern in COPIES:
            for path in directory.glob(pattern):
                results[output / name / path.name] = path.read_bytes()
    replaced = sum(path.exists() for path in results)
    for path, content in results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return table, replaced


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("plot_runs", __doc__)
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("runs", nargs="+", help="directories of runs")
    args = parser.parse_args(arguments)
    with cli.user_errors():
        runs = [as_path("RUN", run) for run in args.runs]
        output = as_path("--output", args.output)
        table, replaced = compare(runs, output)
        print(printable(table, "\n"))
        again = f"; {quantity(replaced, 'file')} of an earlier call replaced"
        print(printable(f"written to {output}{again if replaced else ''}"))


if __name__ == "__main__":
    main()
