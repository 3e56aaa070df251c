"""Learning curves and a table of several runs, from their files alone."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; not the one that a run is writing.

    Raises:
      ValueError: another one cannot be read; names it and the mend.
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
    """(step, value) of one number, where it was written; null says it was none."""
    return [
        (int(line["step"]), line[name]) for line in lines if line.get(name) is not None
    ]


def draw(
    runs: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str]
) -> bytes:
    """One panel a number, one line a run: the bytes of a PNG file.

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
    """Markdown: first, best and last value of a number in every run.

    Raises:
      ValueError: a run does not have it.
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
