"""Reliability diagram and expected calibration error of pixels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.examples import open_common
from mpmc_jax.types import IGNORE_LABEL


def confidence_sums(confidence: np.ndarray, right: np.ndarray, bins: int) -> np.ndarray:
    """Sums pixels by confidence, in bins of equal width in 0..1.

    Args:
      confidence: (n,) in 0..1.
      right: (n,) bool, whether the prediction is right.
      bins: number of bins; an edge belongs to the bin above it, 1 to the last.

    Returns:
      (bins,3): number of pixels, sum of the confidence, number of right pixels.
    """
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    weights = (None, confidence, right)
    sums = [np.bincount(place, weight, minlength=bins) for weight in weights]
    return np.stack(sums, axis=1).astype(np.float64)


def expected_calibration_error(sums: np.ndarray) -> float:
    """Computes the mean over pixels of |accuracy - confidence| of their bins.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), eq. 3.
    """
    count, confidence, right = sums.T
    return float(np.abs(right - confidence).sum() / count.sum())


@dataclasses.dataclass(frozen=True)
class Reliability(Figure):
    """Reliability diagram and expected calibration error of pixels, per run.

    Attributes:
      bins: bins of the confidence.
    """

    bins: int = 15

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a panel per run from the validation images."""
        if self.bins < 1:
            raise ValueError(f"bins={self.bins}: at least 1 is needed")
        named, dataset = by_name(runs), open_common(runs)
        sums = {name: np.zeros((self.bins, 3)) for name in named}
        for example in dataset:
            known = example.label != IGNORE_LABEL
            for name, run in named.items():
                scores = run.restored.predictor.probabilities(example.image)
                right = scores.argmax(-1) == example.label
                # Rounding may exceed 1.
                confidence = np.minimum(scores.max(-1), 1)
                sums[name] += confidence_sums(
                    confidence[known], right[known], self.bins
                )
        rows = [row for name in named for row in _rows(name, sums[name])]
        return drawing_of(_panels(rows), rows)


def _rows(run: str, sums: np.ndarray) -> list[dict[str, Any]]:
    """Returns a row of the table per bin that has pixels."""
    error, bins = expected_calibration_error(sums), len(sums)
    return [
        {
            "run": run,
            "expected_calibration_error": error,
            "confidence_from": number / bins,
            "confidence_to": (number + 1) / bins,
            "pixels": int(count),
            "share": count / sums[:, 0].sum(),
            "confidence": confidence / count,
            "accuracy": right / count,
        }
        for number, (count, confidence, right) in enumerate(sums)
        if count
    ]


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per run."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    canvas, axes = style.grid(len(runs), 3.6, 3.6, columns=3)
    for run, axis in zip(runs, axes, strict=True):
        own = [row for row in rows if row["run"] == run]
        left, accuracy, share = (
            [row[key] for row in own]
            for key in ("confidence_from", "accuracy", "share")
        )
        width = own[0]["confidence_to"] - own[0]["confidence_from"]
        axis.bar(left, accuracy, width, align="edge", color=style.SKY, label="accuracy")
        axis.bar(
            left,
            share,
            width / 3,
            align="edge",
            color=style.ORANGE,
            label="share of pixels",
        )
        axis.plot(
            [0, 1], [0, 1], "--", marker="", color=style.BLACK, label="calibrated"
        )
        error = own[0]["expected_calibration_error"]
        title = f"{run}\nexpected calibration error {error:.3f}"
        axis.set(title=style.wrapped(title, 3.3))
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    style.legend_below(canvas, axes[0])
    return canvas
