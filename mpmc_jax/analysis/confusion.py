"""Confusion matrices of runs, normalized by the truth."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.examples import open_common
from mpmc_jax.experiments.run import evaluate_split

# Up to this many classes the shares are written into the cells.
_WRITTEN = 12


def normalize_by_truth(confusion: np.ndarray) -> np.ndarray:
    """Divides every row of (C,C) counts by its sum; nan for a class without pixels."""
    count = confusion.sum(1, keepdims=True)
    out = np.full(confusion.shape, np.nan)
    return np.divide(confusion, count, out=out, where=count > 0)


@dataclasses.dataclass(frozen=True)
class Confusion(Figure):
    """Confusion matrix of the validation pixels per run, normalized by the truth."""

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a panel per run."""
        named = by_name(runs)
        names = open_common(runs).info.facts.class_names
        found = {
            name: evaluate_split(run.restored, "val").confusion
            for name, run in named.items()
        }
        rows = [
            {
                "run": run,
                "truth": names[truth],
                "predicted": names[predicted],
                "pixels": confusion[truth, predicted],
                "share": None if np.isnan(share) else share,
            }
            for run, confusion in found.items()
            for (truth, predicted), share in np.ndenumerate(
                normalize_by_truth(confusion)
            )
        ]
        return drawing_of(_panels(found, names), rows)


def _panels(found: dict[str, np.ndarray], names: Sequence[str]):
    """Draws a matrix per run."""
    side = 1.8 + 0.42 * len(names)
    canvas, axes = style.grid(len(found), side + 0.4, side - 0.2, columns=2)
    places = np.arange(len(names))
    for (run, confusion), axis in zip(found.items(), axes, strict=True):
        shares = normalize_by_truth(confusion)
        image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axis.set_xticks(places, names, rotation=90)
        axis.set_yticks(places, names)
        axis.set(title=style.wrapped(run, side), xlabel="predicted", ylabel="truth")
        axis.grid(visible=False)
        for (row, column), share in np.ndenumerate(shares):
            if len(names) <= _WRITTEN and share >= 0.005:
                color = style.BLACK if share > 0.6 else "white"
                text = f"{100 * share:.0f}"
                axis.text(
                    column, row, text, color=color, fontsize=8, ha="center", va="center"
                )
        canvas.colorbar(image, ax=axis, shrink=0.7, label="share of the true class")
    return canvas
