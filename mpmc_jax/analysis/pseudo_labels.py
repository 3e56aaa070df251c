"""Quality of pseudo-labels over training, and of the weights that they get."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.pseudo_label_maps import (
    PseudoLabels,
    pseudo_label_function,
    unlabeled_ids,
)
from mpmc_jax.experiments.run import open_split
from mpmc_jax.methods.pseudo_labels import Threshold
from mpmc_jax.methods.registry import thresholds
from mpmc_jax.types import IGNORE_LABEL

# Pixels per image that the areas under ROC curves are computed from, drawn at random.
_DRAWN = 4096
_SCORES = ("lambda", "confidence", "oracle")


def area_under_roc(right: np.ndarray, score: np.ndarray) -> float | None:
    """Computes the area under the ROC curve of a score that tells right from wrong.

    It is the probability that a right one has a higher score than a wrong one, where a
    tie counts half.

    Args:
      right: (n,) bool.
      score: (n,).

    Returns:
      The area, or None if all are right or all are wrong.
    """
    from sklearn.metrics import roc_auc_score

    if right.all() or not right.any():
        return None
    return float(roc_auc_score(right, score))


@dataclasses.dataclass
class Quality:
    """Sums over images of what `row` reports.

    Attributes:
      threshold: least confidence of a pseudo-label that counts in training; one number,
        or one per class.
    """

    threshold: Threshold

    def __post_init__(self) -> None:
        # Right and wrong pixels: their number, confident ones, lambda_s, the oracle's.
        self._sums = np.zeros((2, 4))
        self._drawn: list[np.ndarray] = []
        self._images = 0

    def add(self, maps: PseudoLabels, label: np.ndarray) -> None:
        """Adds an image: its pseudo-labels and truth, (h,w) each."""
        known = label != IGNORE_LABEL
        right = (maps.label == label)[known]
        scores = np.stack([maps.weight, maps.confidence, maps.oracle])[:, known]
        least = np.asarray(self.threshold, np.float64)
        least = least[maps.label[known]] if least.ndim else np.full(right.shape, least)
        for row, chosen in enumerate((right, ~right)):
            weight, confidence, oracle = scores[:, chosen].astype(np.float64)
            confident = confidence >= least[chosen]
            parts = (chosen.sum(), confident.sum(), weight.sum(), oracle.sum())
            self._sums[row] += parts
        rng = np.random.default_rng(self._images)
        drawn = rng.permutation(right.size)[:_DRAWN]
        self._drawn.append(np.vstack([right[None], scores])[:, drawn])
        self._images += 1

    def row(self) -> dict[str, Any]:
        """Returns the numbers of all images.

        lambda_s is relative to its mean over all pixels, its oracle to the oracle's.
        """
        (right, sure, *lambda_right), (wrong, unsure, *lambda_wrong) = self._sums
        pixels, confident = right + wrong, sure + unsure
        row = {
            "images": self._images,
            "right_pixels": int(right),
            "wrong_pixels": int(wrong),
            "accuracy": right / pixels,
            "threshold": self.threshold,
            "coverage": confident / pixels,
            "accuracy_covered": sure / confident if confident else None,
        }
        for position, name in enumerate(("lambda", "oracle")):
            of_right, of_wrong = lambda_right[position], lambda_wrong[position]
            mean = (of_right + of_wrong) / pixels
            row[f"{name}_right"] = of_right / right / mean if right else None
            row[f"{name}_wrong"] = of_wrong / wrong / mean if wrong else None
        is_right, *scores = np.concatenate(self._drawn, axis=1)
        for name, score in zip(_SCORES, scores, strict=True):
            row[f"auroc_{name}"] = area_under_roc(is_right.astype(bool), score)
        return row


def measure(saved: SavedRun) -> dict[str, Any]:
    """Measures the pseudo-labels of a run's unlabeled training images.

    Raises:
      ValueError: the run has no patch classifier, or no unlabeled image has a label.
      FileNotFoundError, ValueError: see `unlabeled_ids`.
    """
    run = saved.classifying
    predict = pseudo_label_function(run)
    dataset = open_split(run, "train")
    unlabeled = unlabeled_ids(run, saved.workdir, dataset.info)
    chosen = [i for i, name in enumerate(dataset.ids) if name in unlabeled]
    if not chosen:
        raise ValueError("none of the unlabeled images has a label to compare with")
    quality = Quality(thresholds(run.config))
    for number in chosen:
        example = dataset[number]
        inputs = (jnp.asarray(x[None]) for x in (example.image, example.label))
        found = predict(*inputs)
        maps = PseudoLabels(*(each[0] for each in jax.device_get(found)))
        quality.add(maps, example.label)
    return {"run": saved.name, "step": run.step, **quality.row()}


@dataclasses.dataclass(frozen=True)
class PseudoLabelQuality(Figure):
    """Accuracy and coverage of pseudo-labels, and how lambda_s tells right from wrong.

    The pseudo-labels are those of a run's unlabeled training images, whose labels
    training never reads, at every checkpoint that the run keeps. The oracle is lambda_s
    of a patch classifier that is always right.
    """

    checkpoint: ClassVar[str] = "all"

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws lines over the steps of the checkpoints."""
        rows = [
            measure(saved) for run in by_name(runs).values() for saved in run.series()
        ]
        return drawing_of(_panels(rows), rows)


# Title of a panel -> its lines: column of the table, label, style of line.
_PANELS = {
    "pseudo-labels": (
        ("accuracy", "accuracy", "-"),
        ("coverage", "share above the threshold", "--"),
        ("accuracy_covered", "accuracy of these", ":"),
    ),
    "lambda_s / its mean": (
        ("lambda_right", "right", "-"),
        ("lambda_wrong", "wrong", "--"),
        ("oracle_right", "oracle, right", "-."),
        ("oracle_wrong", "oracle, wrong", ":"),
    ),
    "AUROC, right against wrong": (
        ("auroc_lambda", "lambda_s", "-"),
        ("auroc_confidence", "pixel confidence", "--"),
        ("auroc_oracle", "oracle lambda_s", ":"),
    ),
}


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per group of numbers; a color is a run, a style of line a number.

    With a single run, colors are numbers too.
    """
    runs = list(dict.fromkeys(row["run"] for row in rows))
    canvas, axes = style.grid(len(_PANELS), 3.9, 3.9)
    for (title, lines), axis in zip(_PANELS.items(), axes, strict=True):
        for number, run in enumerate(runs):
            own = [row for row in rows if row["run"] == run]
            for position, (column, label, line) in enumerate(lines):
                color = style.COLORS[position if len(runs) == 1 else number]
                name = label if len(runs) == 1 else f"{run}: {label}"
                axis.plot(
                    [row["step"] for row in own],
                    [row[column] for row in own],
                    line,
                    color=color,
                    marker=style.MARKERS[position],
                    label=style.wrapped(name, 3.2),
                )
        axis.set_title(title)
        style.over_steps(axis)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return canvas
