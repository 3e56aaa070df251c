"""Energy of right and missed classes over training (the supplement's Figure 1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, drawing_of
from mpmc_jax.analysis.examples import choose_classes, open_common
from mpmc_jax.analysis.patches import PatchView, patch_function
from mpmc_jax.data.dataset import EvalDataset
from mpmc_jax.experiments.run import Run

KINDS = ("true positives", "false negatives", "false positives")


def label_wise_energy(logits: np.ndarray) -> np.ndarray:
    """Computes log(1 + e^f) of logits f, equation 1 of the supplement."""
    return np.logaddexp(0, logits.astype(np.float64))


def energy_sums(view: PatchView, classes: np.ndarray, number: int) -> np.ndarray:
    """Sums the energy of a class over the pixels where it is right or wrong.

    The energy of a pixel is that of its patch, as in eq. 5.

    Args:
      view: the image's patches.
      classes: (h,w) predicted classes, of the view's size.
      number: the class.

    Returns:
      (3,2): the sum and the number of pixels of each of `KINDS`: of the class and
      predicted so; of the class, but predicted otherwise; predicted so, but of another
      class.
    """
    energy = view.at_pixels(label_wise_energy(view.logits[..., number]))
    known = view.label < view.logits.shape[-1]
    is_true, is_predicted = view.label == number, classes == number
    masks = (is_true & is_predicted, is_true & ~is_predicted, is_predicted & ~is_true)
    return np.array(
        [[energy[mask & known].sum(), (mask & known).sum()] for mask in masks]
    )


def measure(run: Run, dataset: EvalDataset, classes: Sequence[int]) -> np.ndarray:
    """Measures the mean energy of classes and kinds, (n,3), nan where there is none."""
    view_of = patch_function(run)
    total = np.zeros((len(classes), len(KINDS), 2))
    for example in dataset:
        view = view_of(example)
        predicted = view.resized(run.predict(example.image))
        total += [energy_sums(view, predicted, number) for number in classes]
    energy, count = total[..., 0], total[..., 1]
    none = np.full(count.shape, np.nan)
    return np.divide(energy, count, out=none, where=count > 0)


@dataclasses.dataclass(frozen=True)
class SuppFigure1(Figure):
    """Supplement's Figure 1: energy of true positives and false negatives by class.

    The energy log(1 + e^f) is that of the class's logit f of the patch classifier at
    each pixel, at all checkpoints that the runs keep. Several runs differ in length.

    Attributes:
      classes: class names joined by "+", one panel each; "" for all.
    """

    checkpoint: ClassVar[str] = "all"

    classes: str = ""

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a panel per class, a line per kind."""
        # Whatever is wrong shows before the first measurement.
        steps = [each.classifying.step for run in runs for each in run.series()]
        _check_steps(", ".join(run.name for run in runs), steps)
        dataset = open_common(_at_last(runs))
        facts = dataset.info.facts
        chosen = choose_classes(facts, self.classes)
        rows = []
        for run in runs:
            for saved in run.series():
                restored = saved.classifying
                means = measure(restored, dataset, chosen)
                rows += [
                    {
                        "run": saved.name,
                        "step": restored.step,
                        "class": facts.class_names[number],
                        "kind": kind,
                        "energy": None if np.isnan(value) else value,
                    }
                    for number, values in zip(chosen, means, strict=True)
                    for kind, value in zip(KINDS, values, strict=True)
                ]
        return drawing_of(_panels(rows), rows)


def _check_steps(names: str, steps: Sequence[int]) -> None:
    """Raises ValueError unless there are several steps, each of one checkpoint."""
    if len(set(steps)) < 2:
        raise ValueError(
            f"{names}: checkpoints of step {steps[0]} alone; the figure needs two "
            "steps or more: train with --config.train.keep=N, which keeps the newest N "
            "checkpoints, or give several runs"
        )
    if twice := sorted({step for step in steps if steps.count(step) > 1}):
        raise ValueError(
            f"{names}: two checkpoints of step {twice[0]}; give runs of different "
            "lengths, or draw each run by itself"
        )


def _at_last(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """Returns the runs at their last checkpoint where all are asked for."""
    return [[*run.series()][-1] for run in runs]


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per class that has an energy, a line per kind."""
    found = [row for row in rows if row["energy"] is not None]
    classes = list(dict.fromkeys(row["class"] for row in found))
    rows = sorted(rows, key=lambda row: row["step"])
    looks = (
        {"color": style.RIGHT},
        {"color": style.WRONG},
        {"color": style.GRAY, "linestyle": ":"},
    )
    canvas, axes = style.grid(len(classes), 2.8, 2.4)
    for name, axis in zip(classes, axes, strict=True):
        for kind, look in zip(KINDS, looks, strict=True):
            line = [row for row in rows if (row["class"], row["kind"]) == (name, kind)]
            steps = [row["step"] for row in line]
            # A line is broken where there is no such pixel.
            energy = [
                np.nan if row["energy"] is None else row["energy"] for row in line
            ]
            axis.plot(steps, energy, label=kind, **look)
        axis.set(title=name, ylabel="energy")
        style.over_steps(axis)
    style.legend_below(canvas, axes[0])
    return canvas
