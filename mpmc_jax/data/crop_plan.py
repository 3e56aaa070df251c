"""A crop as numbers: which pixels of its image make each of its own, and how much.

What a host sends where the images lie on the device (`data.resident`). Pillow's
arithmetic on bytes is whole numbers throughout, so a device that follows a plan gives
the bytes that Pillow gives. Pillow rounds between its two passes, and from version 13
goes down before across where that is less work; there a byte may differ by one.
"""

import functools
import math

import numpy as np

from mpmc_jax.data.geometry.acdc import Turn
from mpmc_jax.data.geometry.cropping import (
    CropConfig,
    Cut,
    Placement,
    floored,
    interpolation_taps,
    nearest,
    window_box,
)

Arrays = dict[str, np.ndarray]

# Pillow weighs bytes in units of 2^-22 (src/libImaging/Resample.c, PRECISION_BITS).
PRECISION_BITS = 22


def taps_needed(geometry: str, shrink: float) -> int:
    """Most pixels of an axis that one pixel of a crop reads.

    Args:
      geometry: a key of `host.GEOMETRIES`.
      shrink: the greatest ratio of an image's side to its resized one.
    """
    if geometry in ("unimatch", "augseg"):
        return 2 * math.ceil(max(shrink, 1.0)) + 1
    return 2


def plan(cut: Cut, size: tuple[int, int], crop: CropConfig, *, taps: int, stride: int):
    """The arrays that `resident.cut` follows.

    Args:
      cut: what was drawn.
      size: rows and columns of the image.
      crop: its `size` is that of the canvas.
      taps: see `taps_needed`.
      stride: pixels between the rows of the images as they are stored.
    """
    if isinstance(cut, Turn):
        return {"map": _turn_map(cut, size, stride)}
    assert isinstance(cut, Placement)
    return _placement_plan(cut, size, crop.size, taps)


@functools.lru_cache(maxsize=1024)
def _turn_map(turn: Turn, size: tuple[int, int], stride: int) -> np.ndarray:
    """(s,s) int32 place of each pixel's source, -1 where there is none.

    The turn itself is applied to the places, so that rounding is its own.
    """
    rows, columns = np.indices(size, np.int32)
    # What a rotation uncovers is 0.
    places = turn.apply(rows * stride + columns + 1)
    return places.astype(np.int32) - 1


def _placement_plan(
    placement: Placement, size: tuple[int, int], side: int, taps: int
) -> Arrays:
    top, left, bottom, right = placement.window
    if placement.antialias:
        box_rows, box_columns = window_box(placement, size)
        down = _pillow_taps(size[0], box_rows, bottom - top, taps)
        across = _pillow_taps(size[1], box_columns, right - left, taps)
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
    length: int, box: tuple[float, float], size: int, taps: int
) -> tuple[np.ndarray, np.ndarray]:
    """(size,) int32 first source pixels and (size,taps) int32 weights, one axis.

    Source: Pillow, Resample.c, precompute_coeffs and normalize_coeffs_8bpc, for its
    bilinear filter. The box is in single precision there.
    """
    low, high = map(np.float32, box)
    scale = float(high - low) / size
    support = max(scale, 1.0)
    center = float(low) + (np.arange(size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(int), 0)
    end = np.minimum((center + support + 0.5).astype(int), length)
    offsets = np.arange(taps)
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
    """(n,) int32 first source pixels and (n,2) float32 weights, PyTorch's."""
    low, high, fraction = interpolation_taps(length, resized, start, stop)
    # At the last pixel both taps are the same one: all weight lies on the first.
    fraction = np.where(high > low, fraction, 0).astype(np.float32)
    return low.astype(np.int32), np.stack([1 - fraction, fraction], axis=1)
