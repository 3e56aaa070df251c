"""Draws image, truth, prediction and lambda_s of a run's validation images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, drawing_of_picture
from mpmc_jax.analysis.pseudo_label_maps import pseudo_label_function
from mpmc_jax.evaluation.pictures import colorize, displayable, heat_map, panel
from mpmc_jax.experiments.run import open_split
from mpmc_jax.types import IGNORE_LABEL

CAPTIONS = ("image", "truth", "prediction", "lambda_s")


@dataclasses.dataclass(frozen=True)
class Panels(Figure):
    """Image, truth, prediction and lambda_s of the first validation images of a run.

    All have the size of the first one. The gray levels of lambda_s run from the
    smallest to the largest value of each image; the table has both.

    Attributes:
      images: how many images, one per row.
    """

    images: int = 4

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws the panel of one run."""
        if self.images < 1:
            raise ValueError(f"images={self.images}: at least 1 is needed")
        if len(runs) != 1:
            raise ValueError(f"panels show one run; {len(runs)} are given")
        run = runs[0].classifying
        predict = pseudo_label_function(run)
        dataset = open_split(run, "val")
        chosen = [i for i in range(len(dataset)) if dataset.size(i) == dataset.size(0)]
        pictures, rows = [], []
        for number in chosen[: self.images]:
            example = dataset[number]
            image, label = (
                jnp.asarray(x[None]) for x in (example.image, example.label)
            )
            found = predict(image, label)
            classes, weight = (np.asarray(x[0]) for x in (found.label, found.weight))
            pictures.append(
                [
                    displayable(example.image, run.facts.pixels),
                    colorize(example.label, run.facts.palette),
                    colorize(classes, run.facts.palette),
                    heat_map(weight),
                ]
            )
            rows.append(_row(example.id, example.label, classes, weight))
        return drawing_of_picture(panel(pictures, CAPTIONS), rows)


def _row(
    name: str, label: np.ndarray, classes: np.ndarray, weight: np.ndarray
) -> dict[str, Any]:
    """Returns an image's pixel accuracy and the range of its lambda_s."""
    known = label != IGNORE_LABEL
    return {
        "image": name,
        "pixel_accuracy": (classes == label)[known].mean() if known.any() else None,
        "lambda_s_min": weight.min(),
        "lambda_s_mean": weight.mean(),
        "lambda_s_max": weight.max(),
    }
