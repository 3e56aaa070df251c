"""Crop plans: the source pixels and weights of every pixel of a crop.

With images cached on the device (`data.resident`) the host sends plans instead of
pixels. Pillow resizes bytes in integer arithmetic throughout, so a device that follows
a plan gives the same bytes as Pillow. Pillow rounds between its two passes, and from
version 13 resizes vertically first where that is less work; there a byte may differ by
one.
"""

import functools
import math

import numpy as np

from mpmc_jax.data.geometry.acdc import Rotation
from mpmc_jax.data.geometry.cropping import (
    CropConfig,
    Cut,
    Placement,
    floored,
    interpolation_neighbors,
    nearest,
    window_box,
)

Arrays = dict[str, np.ndarray]

# Pillow weighs bytes in units of 2^-22 (src/libImaging/Resample.c, PRECISION_BITS).
PRECISION_BITS = 22


def filter_taps_needed(resampling: str, shrink: float) -> int:
    """Returns the most source pixels per axis that one pixel of a crop is made of.

    Args:
      resampling: see `Geometry.resampling`.
      shrink: the greatest ratio of an image's side to its resized side.
    """
    if resampling == "pillow":
        return 2 * math.ceil(max(shrink, 1.0)) + 1
    return 2


def plan(
    cut: Cut,
    size: tuple[int, int],
    crop_config: CropConfig,
    *,
    filter_taps: int,
    stride: int,
):
    """Returns the arrays from which `device_cache.cut_stream` makes a crop.

    Args:
      cut: the drawn crop.
      size: rows and columns of the image.
      crop_config: the crop settings; `size` is the canvas's side.
      filter_taps: see `filter_taps_needed`.
      stride: pixels per row of the cached images.
    """
    if isinstance(cut, Rotation):
        return {"map": _rotation_map(cut, size, stride)}
    assert isinstance(cut, Placement)
    return _placement_plan(cut, size, crop_config.size, filter_taps)


@functools.lru_cache(maxsize=1024)
def _rotation_map(turn: Rotation, size: tuple[int, int], stride: int) -> np.ndarray:
    """Returns (s,s) int32: flat index of each pixel's source, -1 where there is none.

    The turn is applied to an image of indices, so that it rounds as for any image.
    """
    rows, columns = np.indices(size, np.int32)
    # A rotation fills the corners with 0, so indices begin at 1.
    places = turn.apply(rows * stride + columns + 1)
    return places.astype(np.int32) - 1


def _placement_plan(
    placement: Placement, size: tuple[int, int], side: int, filter_taps: int
) -> Arrays:
    top, left, bottom, right = placement.window
    if placement.antialias:
        box_rows, box_columns = window_box(placement, size)
        down = _pillow_taps(size[0], box_rows, bottom - top, filter_taps)
        across = _pillow_taps(size[1], box_columns, right - left, filter_taps)
        pick = nearest
    else:
        down = _two_taps(size[0], placement.resized[0], top, bottom)
        across = _two_taps(size[1], placement.resized[1], left, right)
        pick = floored
    label_rows = pick(size[0], placement.resized[0])[top:bottom]
    label_columns = pick(size[1], placement.resized[1])[left:right]
    first_row, first_column, _, _ = placement.extent()
    by_name = {
        "rows": (down[0], first_row, False),
        "row_weights": (down[1], first_row, False),
        "columns": (across[0], first_column, placement.flip),
        "column_weights": (across[1], first_column, placement.flip),
        "label_rows": (label_rows.astype(np.int32), first_row, False),
        "label_columns": (label_columns.astype(np.int32), first_column, placement.flip),
    }
    return {
        name: _on_canvas(values, first, side, mirrored=mirrored)
        for name, (values, first, mirrored) in by_name.items()
    }


def _on_canvas(
    values: np.ndarray, first: int, side: int, *, mirrored: bool
) -> np.ndarray:
    canvas = np.zeros((side, *values.shape[1:]), values.dtype)
    canvas[first : first + len(values)] = values[::-1] if mirrored else values
    return canvas


def _pillow_taps(
    length: int, box: tuple[float, float], size: int, filter_taps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first source pixel and the weights of each pixel along an axis.

    They are (size,) and (size,filter_taps), int32. Source: Pillow, Resample.c,
    precompute_coeffs and normalize_coeffs_8bpc, with the bilinear filter. Pillow holds
    the box in single precision.
    """
    low, high = map(np.float32, box)
    scale = float(high - low) / size
    support = max(scale, 1.0)
    center = float(low) + (np.arange(size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(int), 0)
    end = np.minimum((center + support + 0.5).astype(int), length)
    offsets = np.arange(filter_taps)
    distance = (offsets + first[:, None] - center[:, None] + 0.5) * (1.0 / support)
    weights = np.maximum(1.0 - np.abs(distance), 0.0)
    weights[offsets >= (end - first)[:, None]] = 0.0
    total = np.zeros(size)
    for column in weights.T:  # in Pillow's order
        total = total + column
    # Pillow skips the division only where the sum is 0, which no crop has.
    weights /= total[:, None]
    fixed = (0.5 + weights * (1 << PRECISION_BITS)).astype(np.int32)
    return first.astype(np.int32), fixed


def _two_taps(
    length: int, resized: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns PyTorch's first source pixels (n,) int32 and weights (n,2) float32."""
    low, high, fraction = interpolation_neighbors(length, resized, start, stop)
    # At the last pixel both taps are the same pixel: the first gets all the weight.
    fraction = np.where(high > low, fraction, 0).astype(np.float32)
    return low.astype(np.int32), np.stack([1 - fraction, fraction], axis=1)
