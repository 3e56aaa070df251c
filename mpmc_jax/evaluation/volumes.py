"""Metrics of whole volumes: Dice, HD95 and ASD of every class except background.

They are defined as in medpy, which the published tables use. A surface consists of the
voxels removed by an erosion with the six neighbors; distances are Euclidean, in voxels.
Dice is 2 I / (P + T). HD95 is the 95th percentile of the distances from each surface to
the other, and ASD the mean distance from the predicted surface to the true one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

FIGURES = ("dice", "hd95", "asd")


@dataclasses.dataclass(frozen=True)
class VolumeScores:
    """The metrics of every volume and class 1..C-1.

    If a class is absent from both prediction and truth, all three are nan. If it is in
    only one of them, Dice is 0 and the distances are nan. nan is left out of the means
    and counted.

    Attributes:
      values: (V,C-1,3) float64 for V volumes, ordered as in `FIGURES`.
    """

    values: np.ndarray

    def means(self) -> np.ndarray:
        """The means over volumes without nan, (C-1,3); nan if all are nan."""
        defined = ~np.isnan(self.values)
        total = np.where(defined, self.values, 0).sum(0)
        count = defined.sum(0)
        out = np.full(total.shape, np.nan)
        return np.divide(total, count, out=out, where=count > 0)

    def undefined(self) -> np.ndarray:
        """The number of volumes left out of each mean, (C-1,3)."""
        return np.isnan(self.values).sum(0)

    def scalars(self, class_names: Sequence[str]) -> dict[str, float]:
        """The metrics by logged name: `dice` (mean over classes), `dice/<class>`."""
        means, undefined = self.means(), self.undefined()
        scalars: dict[str, float] = {}
        for i, name in enumerate(FIGURES):
            column = means[:, i]
            known = column[~np.isnan(column)]
            scalars[name] = float(known.mean()) if known.size else float("nan")
            scalars[f"{name}_left_out"] = float(undefined[:, i].sum())
            for title, value in zip(class_names[1:], column, strict=True):
                if not np.isnan(value):
                    scalars[f"{name}/{title}"] = float(value)
        return scalars


def score_volume(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int
) -> np.ndarray:
    """The metrics of one volume, (C-1,3), see `VolumeScores`.

    Args:
      prediction, truth: (slices,h,w) classes.
      num_classes: C.

    Raises:
      ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {prediction.shape} and truth {truth.shape} must have the same "
            "shape"
        )
    return np.array(
        [
            score_class(prediction == label, truth == label)
            for label in range(1, num_classes)
        ]
    )


def score_class(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, ...]:
    """Dice, HD95 and ASD of two masks; nan if undefined."""
    size = int(prediction.sum()) + int(truth.sum())
    if not size:
        return (np.nan, np.nan, np.nan)
    dice = 2 * int((prediction & truth).sum()) / size
    if not prediction.any() or not truth.any():
        return (dice, np.nan, np.nan)
    there = surface_distances(prediction, truth)
    back = surface_distances(truth, prediction)
    hd95 = np.percentile(np.concatenate([there, back]), 95)
    return (dice, float(hd95), float(there.mean()))


def surface_distances(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distances from each voxel of a mask's surface to the other mask's surface."""
    distance = ndimage.distance_transform_edt(~_surface(other))
    return np.asarray(distance)[_surface(mask)]


def _surface(mask: np.ndarray) -> np.ndarray:
    neighbors = ndimage.generate_binary_structure(mask.ndim, 1)
    return mask ^ ndimage.binary_erosion(mask, neighbors)
