"""Segmentation of image patches by how well their classes are predicted (Table 4)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, drawing_of
from mpmc_jax.analysis.examples import open_common
from mpmc_jax.analysis.patches import PatchView, patch_function
from mpmc_jax.types import IGNORE_LABEL

BINS = 10
# Table 4 of the paper, from bin 0-10 to 90+: share of the patches in percent, and the
# change of mIoU in points.
PUBLISHED_SHARE = (6.3, 2.4, 10.2, 4.1, 5.2, 5.1, 8.4, 20.5, 25.2, 12.6)
PUBLISHED_CHANGE = (-2.20, -1.90, 0.10, 0.49, 1.15, 0.91, 1.55, 0.88, 1.57, 4.05)


def hamming_bins(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the bin of 1 - Hamming loss of every patch: (r,c,C) twice -> (r,c).

    Bin i has the patches of which at least i and less than i + 1 tenths of the classes
    are predicted right, at probability 1/2; the last one has those of all, too.
    """
    right = ((logits > 0) == targets).sum(-1)
    return np.minimum(right * BINS // logits.shape[-1], BINS - 1)


def patch_miou(view: PatchView, classes: np.ndarray) -> np.ndarray:
    """Computes the mean IoU inside every patch.

    Args:
      view: the image's patches.
      classes: (h,w) predicted classes, of the view's size.

    Returns:
      (r,c), the mean over the classes in the truth or the prediction of the patch's
      labeled pixels; nan for patches without any.
    """
    known = view.label != IGNORE_LABEL
    total, number = np.zeros(view.valid.shape), np.zeros(view.valid.shape)
    for each in range(view.logits.shape[-1]):
        truth, predicted = known & (view.label == each), known & (classes == each)
        union = view.count(truth | predicted)
        total += view.count(truth & predicted) / np.maximum(union, 1)
        number += union > 0
    out = np.full(number.shape, np.nan)
    return np.divide(total, number, out=out, where=number > 0)


@dataclasses.dataclass(frozen=True)
class Table4(Figure):
    """Table 4: change of mIoU within patches by 1 - Hamming loss of their classes.

    The first run is the baseline, the second has MPMC; its patch classifier sorts the
    patches.
    """

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a bar per bin."""
        if len(runs) != 2:
            raise ValueError(
                f"table4 compares two runs, the baseline and MPMC; {len(runs)} given"
            )
        baseline, mpmc = runs
        view_of = patch_function(mpmc.classifying)
        sums = np.zeros((BINS, 3))
        for example in open_common(runs):
            view = view_of(example)
            place = hamming_bins(view.logits, view.targets)
            before, after = (
                patch_miou(view, view.resized(run.restored.predict(example.image)))
                for run in (baseline, mpmc)
            )
            # A patch of padding alone has no mIoU.
            counts = view.valid & ~np.isnan(before)
            for column, values in enumerate((np.ones_like(before), before, after)):
                sums[:, column] += np.bincount(
                    place[counts], values[counts], minlength=BINS
                )
        rows = _rows(sums)
        return drawing_of(_bars(rows), rows)


def _rows(sums: np.ndarray) -> list[dict[str, Any]]:
    """Returns a row of the table per bin, the best first, as in the paper."""
    rows = []
    for number in reversed(range(BINS)):
        count, before, after = sums[number]
        before, after = (100 * x / count if count else None for x in (before, after))
        changed = None if before is None or after is None else after - before
        rows.append(
            {
                "hamming_accuracy": f"{10 * number}-{10 * number + 10}",
                "patches": int(count),
                "percent_of_patches": 100 * count / sums[:, 0].sum(),
                "miou_baseline": before,
                "miou_mpmc": after,
                "miou_change": changed,
                "published_percent_of_patches": PUBLISHED_SHARE[number],
                "published_miou_change": PUBLISHED_CHANGE[number],
            }
        )
    return rows


def _bars(rows: Sequence[dict[str, Any]]):
    """Draws our changes of mIoU and shares of patches beside the published ones."""
    canvas, axes = style.grid(2, 6.4, 2.9, columns=1)
    places = np.arange(len(rows))
    columns = (
        ("miou_change", "change of mIoU\nin points"),
        ("percent_of_patches", "% of patches"),
    )
    for axis, (column, label) in zip(axes, columns, strict=True):
        ours = [np.nan if row[column] is None else row[column] for row in rows]
        published = [row[f"published_{column}"] for row in rows]
        axis.bar(places - 0.2, ours, 0.4, color=style.BLUE, label="these runs")
        axis.bar(places + 0.2, published, 0.4, color=style.ORANGE, label="published")
        axis.axhline(0, color=style.BLACK, linewidth=0.8, marker="")
        axis.set_xticks(places, [row["hamming_accuracy"] for row in rows])
        axis.set_ylabel(label)
    axes[0].legend()
    axes[1].set_xlabel("1 - Hamming loss of the patch classifier in %")
    return canvas
