"""Learning curves and a table of several runs, from their files alone."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Canvas

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.text import markdown_table
from mpmc_jax.training.workdir import CONFIG, MANIFEST, read_manifest

# What is copied of a run: its settings, versions, metrics and results.
COPIES = (CONFIG, MANIFEST, "metrics.jsonl", "eval_*.json")

# The metric by which runs are compared: Dice where volumes are scored.
SCORES = ("val/dice", "val/miou")
LOSS = "train/loss_supervised"


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
      copy_runs: 1 to write a table of the scores as well, and copies of each run's
        settings, metrics and results; 0 for the curves alone.
    """

    score: str = ""
    loss: str = LOSS
    copy_runs: int = 0

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws one panel per number, one line per run; reads the runs' files alone."""
        named = by_name(runs)
        lines = {name: run.metrics for name, run in named.items()}
        names = (self.score or choose_score(lines), self.loss)
        rows = [
            {"run": run, "step": step, "name": name, "value": value}
            for name in names
            for run, each in lines.items()
            for step, value in series(each, name)
        ]
        drawing = drawing_of(_panels(lines, names), rows)
        if not self.copy_runs:
            return drawing
        others = {"table.md": _summary(named, lines, names[0]).encode()}
        for name, run in named.items():
            for pattern in COPIES:
                for path in run.workdir.glob(pattern):
                    others[f"{name}/{path.name}"] = path.read_bytes()
        return dataclasses.replace(drawing, others=others)


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
    canvas, axes = style.grid(len(names), 4.6, 3.6)
    for axis, name in zip(axes, names, strict=True):
        for run, lines in runs.items():
            points = series(lines, name)
            if points:
                axis.plot(*zip(*points, strict=True), label=run)
        if not axis.lines:
            raise ValueError(f"no run has written {name!r}")
        axis.set_title(name)
        style.over_steps(axis)
    style.legend_below(canvas, max(axes, key=lambda axis: len(axis.lines)))
    return canvas


def table(
    runs: Mapping[str, Sequence[Mapping[str, float]]], name: str = "val/miou"
) -> str:
    """Makes a Markdown table of the first, best and last value of a number per run.

    Raises:
      ValueError: a run does not have the number.
    """
    head = ["run", f"first {name} (step)", "best (step)", "last (step)", "last/first"]
    rows = []
    for run, lines in runs.items():
        points = series(lines, name)
        if not points:
            raise ValueError(f"run {run!r} has not written {name!r} yet")
        first, last = points[0], points[-1]
        best = max(points, key=lambda point: point[1])
        cells = [f"{value:.4f} ({step})" for step, value in (first, best, last)]
        ratio = f"{last[1] / first[1]:.2f}" if first[1] else "-"
        rows.append([run, *cells, ratio])
    return f"{markdown_table(head, rows)}\n"


def _summary(
    runs: Mapping[str, SavedRun],
    lines: Mapping[str, Sequence[Mapping[str, float]]],
    score: str,
) -> str:
    """Makes the content of table.md, which names the runs on a partial data set."""
    partial = [
        name
        for name, run in runs.items()
        if read_manifest(run.workdir)["data"].get("partial")
    ]
    note = f"\nOn a partial data set: {', '.join(partial)}\n" if partial else ""
    return table(lines, score) + note
