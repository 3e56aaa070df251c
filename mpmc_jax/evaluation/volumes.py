"""Figures of whole volumes: Dice, HD95 and ASD of every class but the background.

As medpy defines them, which the published tables use: a surface is what erosion by the
six neighbors takes away, distances are Euclidean, in voxels. Dice is 2 I / (P + T).
HD95 is the 95th percentile of the distances from either surface to the other, ASD the
mean distance from the predicted surface to the true one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

FIGURES = ("dice", "hd95", "asd")


@dataclasses.dataclass(frozen=True)
class VolumeScores:
    """Figures of every volume and class 1..C-1.

    A class that occurs in neither leaves the means of its volume; one that is in only
    one of the two has Dice 0 and no distance. Both are nan here, and counted.

    Attributes:
      values: (V,C-1,3) float64, the figures as in `FIGURES`, nan where undefined.
    """

    values: np.ndarray

    def means(self) -> np.ndarray:
        """(C-1,3) means over the volumes where a figure is defined, nan without one."""
        defined = ~np.isnan(self.values)
        total = np.where(defined, self.values, 0).sum(0)
        count = defined.sum(0)
        out = np.full(total.shape, np.nan)
        return np.divide(total, count, out=out, where=count > 0)

    def undefined(self) -> np.ndarray:
        """(C-1,3) volumes whose figure left the mean."""
        return np.isnan(self.values).sum(0)

    def scalars(self, class_names: Sequence[str]) -> dict[str, float]:
        """`dice`, `hd95`, `asd`: means over classes; and `dice/<class>` and so on."""
        means, undefined = self.means(), self.undefined()
        figures: dict[str, float] = {}
        for i, name in enumerate(FIGURES):
            column = means[:, i]
            known = column[~np.isnan(column)]
            figures[name] = float(known.mean()) if known.size else float("nan")
            figures[f"{name}_left_out"] = float(undefined[:, i].sum())
            for title, value in zip(class_names[1:], column, strict=True):
                if not np.isnan(value):
                    figures[f"{name}/{title}"] = float(value)
        return figures


def score_volume(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int
) -> np.ndarray:
    """(C-1,3) figures of one volume, see `VolumeScores`.

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
    """Dice, HD95 and ASD of two masks, nan where undefined."""
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
    """Distance of each voxel of a mask's surface to the nearest of the other's."""
    distance = ndimage.distance_transform_edt(~_surface(other))
    return np.asarray(distance)[_surface(mask)]


def _surface(mask: np.ndarray) -> np.ndarray:
    neighbors = ndimage.generate_binary_structure(mask.ndim, 1)
    return mask ^ ndimage.binary_erosion(mask, neighbors)
