"""Learning curves and a table of several runs, from their files alone."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt

from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.training.workdir import CHECKPOINTS, read_manifest

COPIES = (
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "eval_*.json",
    "trust_*.json",
)

# The metric by which runs are compared: Dice where volumes are scored.
SCORES = ("val/dice", "val/miou")
LOSS = "train/loss_supervised"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the lines of a metrics.jsonl, except one that a run is writing.

    Raises:
      ValueError: a line cannot be read; the message names it and the fix.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            if line.endswith(b"\n"):
                found = json.loads(line)
                lines.append({**found, "step": int(found["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: line {number} cannot be read; `launch.train` on that run "
                f"moves it to {path.name}.cut"
            ) from error
    return lines


def series(lines: Sequence[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of one number where it was written and is not null."""
    return [
        (int(line["step"]), line[name]) for line in lines if line.get(name) is not None
    ]


def draw(
    runs: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]
) -> bytes:
    """Draws one panel per number, one line per run; returns the bytes of a PNG.

    Raises:
      ValueError: no run has one of the numbers.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6))
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        for run, lines in runs.items():
            points = series(lines, name)
            if points:
                axis.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        if not axis.lines:
            raise ValueError(f"no run has written {name!r}")
        axis.set_xlabel("step")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    plt.close(figure)
    return stream.getvalue()


def table(
    runs: Mapping[str, Sequence[Mapping[str, float]]], name: str = "val/miou"
) -> str:
    """Makes a Markdown table of the first, best and last value of a number per run.

    Raises:
      ValueError: a run does not have the number.
    """
    rows = [f"| run | first {name} (step) | best (step) | last (step) | last/first |"]
    rows.append("|---|---|---|---|---|")
    for run, lines in runs.items():
        points = series(lines, name)
        if not points:
            raise ValueError(f"run {run!r} has not written {name!r} yet")
        first, last = points[0], points[-1]
        best = max(points, key=lambda point: point[1])
        cells = [f"{value:.4f} ({step})" for step, value in (first, best, last)]
        ratio = f"{last[1] / first[1]:.2f}" if first[1] else "-"
        rows.append(f"| {run} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(rows) + "\n"


def compare(runs: Sequence[Path], output: Path) -> tuple[str, int]:
    """Writes the comparison of `runs` to `output`.

    Returns:
      The table, and how many files of an earlier comparison were replaced.

    Raises:
      ValueError: two runs have one name, a run has no evaluation, or the output folder
        holds a run, whose files would be overwritten.
      OSError: a run does not exist, or the output cannot be written.
    """
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
        name: read_metrics(directory / "metrics.jsonl")
        for name, directory in directories.items()
    }
    written = {name for run in lines.values() for line in run for name in line}
    score = next((name for name in SCORES if name in written), SCORES[-1])
    drawn = draw(lines, (score, LOSS))
    summary = table(lines, score)
    partial = [
        name
        for name, directory in directories.items()
        if read_manifest(directory)["data"].get("partial")
    ]
    if partial:
        summary += f"\nOn a partial data set: {', '.join(partial)}\n"
    results = {output / "curves.png": drawn, output / "table.md": summary.encode()}
    for name, directory in directories.items():
        for pattern in COPIES:
            for path in directory.glob(pattern):
                results[output / name / path.name] = path.read_bytes()
    replaced = sum(path.exists() for path in results)
    for path, content in results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return summary, replaced
