"""Compares the borders of classes in masks with the edges in their images.

Borders of correct labels lie on edges: the difference between neighboring pixels is
larger there than elsewhere. The contrast of a mask is the mean difference across its
borders, in units of the image's mean difference. Where it grows if the mask is
mirrored, shifted or exchanged for another one, the mask is likely to be wrong.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mpmc_jax.types import IGNORE_LABEL

# Shifts of the mask that are tried at full size, in pixels to all sides.
REACH = 3
# Masks are mirrored and shifted by more at about this size.
_SMALL = 128
_SMALL_SHIFTS = (-8, -6, -4, -3, -2, 2, 3, 4, 6, 8)
# At full size a part of this size is enough.
_PART = 1600
# A difference counts as at most so many times the mean, and fewer borders say nothing.
_LARGEST = 6.0
_FEWEST = 40
_FLIPS = {
    "mirrored left to right": np.s_[:, ::-1],
    "mirrored top to bottom": np.s_[::-1],
    "turned by 180 degrees": np.s_[::-1, ::-1],
}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Differences between the neighboring pixels of an image, with a mean of 1.

    Attributes:
      right: (h,w-1), between each pixel and the one to its right.
      down: (h-1,w), between each pixel and the one below it.
    """

    right: np.ndarray
    down: np.ndarray


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The contrast of a mask.

    Attributes:
      mean: mean difference across borders; 0 without borders.
      count: number of pairs of pixels across borders.
    """

    mean: float
    count: int

    def gain_over(self, other: "Contrast") -> float:
        """Returns how much larger this contrast is, in about standard deviations."""
        count = min(self.count, other.count)
        return (self.mean - other.mean) * float(np.sqrt(count)) if count else 0.0


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a mask fits its image.

    Attributes:
      own: contrast of the mask as it is, at a small size.
      best: contrast of the best change of it.
      change: what that change says about the mask, such as "mirrored left to right".
      profile: (2 REACH + 1, 2 REACH + 1) contrast of the mask, moved by that many
        pixels down and to the right, at full size; zeros without enough borders.
    """

    own: Contrast
    best: Contrast
    change: str
    profile: np.ndarray


def center(shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns the central part of a large image that is looked at in full size."""
    top, left = (max(0, (side - _PART) // 2) for side in shape[:2])
    return slice(top, top + _PART), slice(left, left + _PART)


def steps(image_hwc: np.ndarray) -> Steps:
    """Measures the differences between neighboring pixels."""
    image = np.nan_to_num(image_hwc.astype(np.float32), posinf=0.0, neginf=0.0)
    # Channels count alike, whatever their units.
    image = image / (image.std(axis=(0, 1)) + 1e-6)
    right, down = (np.abs(np.diff(image, axis=axis)).sum(-1) for axis in (1, 0))
    return Steps(
        *(each / (each.sum() / max(each.size, 1) + 1e-9) for each in (right, down))
    )


def small(image_hwc: np.ndarray, label_hw: np.ndarray) -> tuple[Steps, np.ndarray]:
    """Returns the differences and the mask of an image of about 128 pixels."""
    factor = max(1, min(max(label_hw.shape) // _SMALL, *label_hw.shape))
    height, width = (side // factor for side in label_hw.shape)
    image = image_hwc[: height * factor, : width * factor]
    image = image.reshape(height, factor, width, factor, -1)
    image = image.mean((1, 3), dtype=np.float32)
    label_hw = label_hw[factor // 2 :: factor, factor // 2 :: factor]
    return steps(image), label_hw[:height, :width]


def contrast(found: Steps, label_hw: np.ndarray) -> Contrast:
    """Measures a mask on the differences of an image, where both overlap."""
    total, count = 0.0, 0
    for differ_hw, size_hw in zip(
        _borders(label_hw), (found.right, found.down), strict=True
    ):
        height = min(differ_hw.shape[0], size_hw.shape[0])
        width = min(differ_hw.shape[1], size_hw.shape[1])
        across = size_hw[:height, :width][differ_hw[:height, :width]]
        total += float(np.minimum(across, _LARGEST).sum())
        count += across.size
    return Contrast(total / count, count) if count >= _FEWEST else Contrast(0.0, 0)


def fit(image_hwc: np.ndarray, label_hw: np.ndarray) -> Fit:
    """Measures how a mask fits its image, as it is and changed."""
    found, small_hw = small(image_hwc, label_hw)
    own = contrast(found, small_hw)
    best, change = Contrast(0.0, 0), ""
    for name, changed, part in _changes(found, small_hw):
        tried = contrast(part, changed)
        if tried.gain_over(own) > best.gain_over(own):
            best, change = tried, name
    return Fit(own, best, change, _profile(image_hwc, label_hw))


def _borders(label_hw: np.ndarray) -> Iterator[np.ndarray]:
    """Yields where classes change to the right and down, beside void nowhere."""
    known_hw = label_hw != IGNORE_LABEL
    for one, other in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        differ_hw = label_hw[one] != label_hw[other]
        yield differ_hw & known_hw[one] & known_hw[other]


def _changes(
    found: Steps, label_hw: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Steps]]:
    """Yields what may have happened to a mask, the mask mended, and the differences."""
    for name, flip in _FLIPS.items():
        yield name, label_hw[flip], found
    height, width = label_hw.shape
    for shift in _SMALL_SHIFTS:
        size = abs(shift)
        if size < width // 4:
            part = Steps(
                found.right[:, max(-shift, 0) :], found.down[:, max(-shift, 0) :]
            )
            side = "right" if shift > 0 else "left"
            moved = label_hw[:, max(shift, 0) : width + min(shift, 0)]
            yield f"too far to the {side}", moved, part
        if size < height // 4:
            part = Steps(found.right[max(-shift, 0) :], found.down[max(-shift, 0) :])
            side = "low" if shift > 0 else "high"
            moved = label_hw[max(shift, 0) : height + min(shift, 0)]
            yield f"too {side}", moved, part


def _profile(image_hwc: np.ndarray, label_hw: np.ndarray) -> np.ndarray:
    """Returns `Fit.profile`."""
    part = center(label_hw.shape)
    found = steps(image_hwc[part])
    profile = np.zeros((2 * REACH + 1,) * 2)
    count = 0
    for differ_hw, size_hw in zip(
        _borders(label_hw[part]), (found.right, found.down), strict=True
    ):
        rows, columns = np.nonzero(differ_hw)
        height, width = size_hw.shape
        inside = (rows >= REACH) & (rows < height - REACH)
        inside &= (columns >= REACH) & (columns < width - REACH)
        rows, columns = rows[inside], columns[inside]
        count += rows.size
        for i in range(-REACH, REACH + 1):
            for j in range(-REACH, REACH + 1):
                profile[i + REACH, j + REACH] += size_hw[rows + i, columns + j].sum()
    return profile / count if count >= _FEWEST else np.zeros_like(profile)
