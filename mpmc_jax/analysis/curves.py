"""Learning curves and a table of several runs, from their files alone."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
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


@dataclasses.dataclass(frozen=True)
class Curves(Figure):
    """Learning curves of any number of runs: validation score and supervised loss.

    Attributes:
      score: the score in metrics.jsonl; "" for Dice where a run has it, else mIoU.
      loss: the loss in metrics.jsonl.
    """

    score: str = ""
    loss: str = LOSS

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws one panel per number, one line per run; reads metrics.jsonl alone."""
        lines = {
            name: read_metrics(run.workdir / "metrics.jsonl")
            for name, run in by_name(runs).items()
        }
        names = (self.score or choose_score(lines), self.loss)
        rows = [
            {"run": run, "step": step, "name": name, "value": value}
            for name in names
            for run, each in lines.items()
            for step, value in series(each, name)
        ]
        return drawing_of(_panels(lines, names), rows)


def choose_score(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Returns the name of the score by which the runs are compared."""
    written = {name for lines in runs.values() for line in lines for name in line}
    return next((name for name in SCORES if name in written), SCORES[-1])


def _panels(
    runs: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]
) -> Canvas:
    """Draws one panel per number, one line per run.

    Raises:
      ValueError: no run has one of the numbers.
    """
    canvas = Canvas(figsize=(5 * len(names), 3.6))
    for axis, name in zip(canvas.subplots(1, len(names)), names, strict=True):
        for run, lines in runs.items():
            points = series(lines, name)
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=run, marker=".", linewidth=1.2
                )
        if not axis.lines:
            raise ValueError(f"no run has written {name!r}")
        axis.set_xlabel("step")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.legend()
    canvas.tight_layout()
    return canvas


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
    saved = by_name([SavedRun(run) for run in runs])
    for name, run in saved.items():
        _check_not_overwritten(run, output / name, output)
    lines = {
        name: read_metrics(run.workdir / "metrics.jsonl") for name, run in saved.items()
    }
    drawing = Curves().draw([*saved.values()])
    summary = table(lines, choose_score(lines))
    partial = [
        name
        for name, run in saved.items()
        if read_manifest(run.workdir)["data"].get("partial")
    ]
    if partial:
        summary += f"\nOn a partial data set: {', '.join(partial)}\n"
    contents = {output / "table.md": summary.encode()}
    for name, run in saved.items():
        for pattern in COPIES:
            for path in run.workdir.glob(pattern):
                contents[output / name / path.name] = path.read_bytes()
    contents |= drawing.files(output / "curves")
    replaced = sum(path.exists() for path in contents)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return summary, replaced


def _check_not_overwritten(run: SavedRun, copy: Path, output: Path) -> None:
    """Checks that the copied files of a run replace no run's own.

    Raises:
      ValueError: `copy` is the run itself, or another run.
    """
    if copy.resolve() == run.workdir.resolve():
        raise ValueError(
            f"--output={output} holds the run {run.workdir} itself, and its files "
            "would be written over; choose another --output"
        )
    if (copy / CHECKPOINTS).exists():
        raise ValueError(
            f"{copy} is a run of its own, whose files would be written over; choose "
            "another --output"
        )
