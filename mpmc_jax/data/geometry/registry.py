"""The random geometry of training crops: resize, crop and flip, or ACDC's rotations.

Published orders (UniMatch, AugSeg, and one for U2PL and AEL):

    unimatch   resize, pad, crop, flip    the flip moves padding to the left
    augseg     resize, flip, pad, crop    padding always at the right
    u2pl       resize, flip, pad, crop    padding on both sides, labeled 0
    acdc       rotate by quarters and mirror, or rotate, then zoom    see `acdc`

The first two pad at the bottom. A geometry draws where a crop comes from, as a `Cut`;
`cropping` and `acdc` then cut it out of image and label alike.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mpmc_jax.data.geometry.acdc import draw_acdc
from mpmc_jax.data.geometry.cropping import CropConfig, Cut, Placement
from mpmc_jax.types import IGNORE_LABEL

# U2PL and AEL pad labels with class 0, as their published code does.
_U2PL_LABEL_FILL = 0


def _draw_offset(rng: np.random.Generator, length: int, size: int) -> int:
    return int(rng.integers(0, max(length - size, 0), endpoint=True))


def _draw_long_side(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> tuple[int, int]:
    """Draws rows and columns by an integer long side, both ends included."""
    long = max(size)
    base = config.scale_base or long
    low, high = int(config.scale_min * base), int(config.scale_max * base)
    drawn = max(int(rng.integers(low, high, endpoint=True)), 1)
    # The short side is rounded, halves up; the long side is what was drawn.
    rows, columns = (max(int(drawn * side / long + 0.5), 1) for side in size)
    return rows, columns


def draw_unimatch(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """Draws UniMatch's crop of an image of `size` (rows, columns).

    Random numbers are drawn in this order: long side, column, row, flip.
    """
    rows, columns = _draw_long_side(rng, size, config)
    left = _draw_offset(rng, columns, config.size)
    top = _draw_offset(rng, rows, config.size)
    flip = bool(rng.random() < 0.5) and config.flip
    right, bottom = min(left + config.size, columns), min(top + config.size, rows)
    column = config.size - (right - left) if flip else 0
    return Placement((rows, columns), (top, left, bottom, right), flip, column)


def _window_before_flip(
    corner: tuple[int, int], resized: tuple[int, int], size: int, flip: bool
) -> tuple[int, int, int, int]:
    """Returns the window in the resized image for a crop of the flipped image."""
    (top, left), (rows, columns) = corner, resized
    right, bottom = min(left + size, columns), min(top + size, rows)
    if flip:
        left, right = columns - right, columns - left
    return top, left, bottom, right


def draw_augseg(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """Draws AugSeg's crop of an image of `size` (rows, columns).

    Random numbers are drawn in this order: scale, flip, column, row. With `scale_base`
    the scale is a long side (VOC), else a factor, and sides are floored (Cityscapes).
    The column counts in the flipped image, because the crop comes last.
    """
    if config.scale_base:
        rows, columns = _draw_long_side(rng, size, config)
    else:
        factor = rng.uniform(config.scale_min, config.scale_max)
        rows, columns = (max(int(factor * side), 1) for side in size)
    flip = bool(rng.random() < 0.5) and config.flip
    left = _draw_offset(rng, columns, config.size)
    top = _draw_offset(rng, rows, config.size)
    window = _window_before_flip((top, left), (rows, columns), config.size, flip)
    return Placement((rows, columns), window, flip, 0)


def draw_u2pl(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """Draws U2PL's and AEL's crop of an image of `size` (rows, columns).

    Random numbers are drawn in this order: whether to shrink or to enlarge, factor,
    flip, row, column. Sides are floored, and padding surrounds the window.
    """
    if rng.random() < 0.5:
        factor = rng.uniform(config.scale_min, max(1.0, config.scale_min))
    else:
        factor = rng.uniform(min(1.0, config.scale_max), config.scale_max)
    rows, columns = (max(int(factor * side), 1) for side in size)
    flip = bool(rng.random() < 0.5) and config.flip
    top = _draw_offset(rng, rows, config.size)
    left = _draw_offset(rng, columns, config.size)
    return Placement(
        (rows, columns),
        _window_before_flip((top, left), (rows, columns), config.size, flip),
        flip,
        column=max(config.size - columns, 0) // 2,
        row=max(config.size - rows, 0) // 2,
        antialias=False,
        label_fill=_U2PL_LABEL_FILL,
    )


Draw = Callable[[np.random.Generator, tuple[int, int], CropConfig], Cut]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How random crops are drawn, and what the device has to know to cut them.

    Attributes:
      draw: draws one crop; takes a generator, rows and columns of the image, and the
        crop settings.
      resampling: how the device computes pixels with `data.resident`, as the cuts of
        `draw` do on the host: "pillow" (bilinear, antialiased), "torch" (bilinear
        without antialias) or "nearest".
      label_fill: label of the padding there, as in the cuts of `draw`.
    """

    draw: Draw
    resampling: str = "pillow"
    label_fill: int = IGNORE_LABEL


GEOMETRIES: dict[str, Geometry] = {
    "unimatch": Geometry(draw_unimatch),
    "augseg": Geometry(draw_augseg),
    "u2pl": Geometry(draw_u2pl, resampling="torch", label_fill=_U2PL_LABEL_FILL),
    "acdc": Geometry(draw_acdc, resampling="nearest"),
}


def build_geometry(name: str) -> Geometry:
    """Returns the geometry `name`.

    Raises:
      ValueError: there is none; the message lists the valid names.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"unknown geometry {name!r}; one of {sorted(GEOMETRIES)}")
    return GEOMETRIES[name]
