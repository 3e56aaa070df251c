"""Average pooling of patch features at several scales, and max-pooling."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.tracing import traced_once
from mpmc_jax.precision import at_least_float32

Array = jax.Array

# As published; and all that the patch classifier takes: 3 is for patches of a vision
# transformer, which are as far apart as four positions of layer1.
WINDOWS = (1, 7, 19)
VALID_WINDOWS = (1, 3, 7, 19)


def average_pool(z_bhwd: Array, window: int) -> Array:
    """Averages over a centered window x window square; keeps the shape (b,h,w,d).

    Zero padding counts: the sum is divided by window^2 at the border too, as the
    published MPMC does. Two one-dimensional sums cost 1/40 of one over the square on a
    CPU and agree up to rounding. They run in float32, or float64 for such input, and
    are rounded once: a 361-term sum in bfloat16 is off by 2 %.

    Raises:
      ValueError: the window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"pooling window {window}: must be odd and positive")
    if window == 1:
        return z_bhwd
    sum_bhwd = at_least_float32(z_bhwd)
    for axis in (1, 2):
        dimensions = [1] * 4
        dimensions[axis] = window
        padding = [(0, 0)] * 4
        padding[axis] = (window // 2, window // 2)
        # The initial value must be concrete: otherwise JAX does not recognize a sum,
        # and there is no gradient.
        sum_bhwd = lax.reduce_window(
            sum_bhwd, 0.0, lax.add, dimensions, (1,) * 4, padding
        )
    return (sum_bhwd / window**2).astype(z_bhwd.dtype)


def multi_scale_pool(z_bhwd: Array, windows: Sequence[int] = WINDOWS) -> Array:
    """Concatenates the pooled maps in the given order: (b,h,w,d*len(windows))."""
    return jnp.concatenate([average_pool(z_bhwd, w) for w in windows], axis=-1)


def add_pooled(joined_bhwd: Array, windows: Sequence[int]) -> Array:
    """Pools each part of the channels at its window, and adds the parts.

    (b,h,w,d*len(windows)) becomes (b,h,w,d).
    """
    if target_platform() == "gpu":
        return _add_pooled(tuple(windows), joined_bhwd)
    parts = jnp.split(joined_bhwd, len(windows), axis=-1)
    return functools.reduce(jnp.add, map(average_pool, parts, windows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _add_pooled(windows: tuple[int, ...], joined_bhwd: Array) -> Array:
    """Pools and adds, without copies of the parts."""
    batch, height, width, channels = joined_bhwd.shape
    shape = (batch, height, width, len(windows), channels // len(windows))
    parts_bhwpd = joined_bhwd.reshape(shape)
    pooled = [_pooled(parts_bhwpd, i, window) for i, window in enumerate(windows)]
    return functools.reduce(jnp.add, pooled).astype(joined_bhwd.dtype)


def _add_pooled_forward(windows, joined_bhwd):
    return _add_pooled(windows, joined_bhwd), None


@traced_once
def _add_pooled_backward(windows, residuals, dy_bhwd):
    """Pools the cotangent at each window: a centered mean is its own transpose."""
    del residuals
    pooled = [_pooled(dy_bhwd[:, :, :, None], 0, window) for window in windows]
    return (jnp.concatenate(pooled, axis=-1).astype(dy_bhwd.dtype),)


_add_pooled.defvjp(_add_pooled_forward, _add_pooled_backward)


def _pooled(parts_bhwpd: Array, part: int, window: int) -> Array:
    """Averages one part of the channels, in at least float32: (b,h,w,d).

    Means of columns are rounded to the map's dtype, which halves what is written.
    """
    if window == 1:
        return at_least_float32(parts_bhwpd[:, :, :, part])
    of_columns = _mean_along(1, parts_bhwpd, part, window).astype(parts_bhwpd.dtype)
    # XLA would drop a rounding between sums in float32.
    of_columns = lax.optimization_barrier(of_columns)
    return _mean_along(2, of_columns, 0, window)[:, :, :, 0]


def _mean_along(axis: int, parts_bhwpd: Array, part: int, window: int) -> Array:
    """Averages one part along an axis, in at least float32: (b,h,w,1,d).

    Negative padding leaves the other parts out. XLA would copy a slice.
    """
    dimensions, padding = [1] * 5, [(0, 0)] * 5
    dimensions[axis] = window
    padding[axis] = (window // 2, window // 2)
    padding[3] = (-part, part + 1 - parts_bhwpd.shape[3])
    sum_bhw1d = lax.reduce_window(
        at_least_float32(parts_bhwpd), 0.0, lax.add, dimensions, (1,) * 5, padding
    )
    return sum_bhw1d / window


class _Windows(NamedTuple):
    """Square windows on a map, by its two axes.

    Attributes:
      size, stride: of the windows.
      pads: how far they reach over the map, before and behind.
      lengths: sides of the map.
    """

    size: int
    stride: int
    pads: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]


def max_pool(
    x_bhwd: Array, size: int, stride: int, pads: tuple[tuple[int, int], ...]
) -> Array:
    """Takes the maximum of square windows; padding never is one.

    The gradient goes to the first of equal maxima. On GPUs XLA would scatter it, and
    write float32 values with int32 positions in the forward pass to know where to.
    There the position in the window is kept, a byte per maximum. Programs for any
    platform take the maximum of slices, which converters to ONNX know.
    """
    windows = _Windows(size, stride, pads, x_bhwd.shape[1:3])
    if target_platform() == "any":
        seen = [seen_bhwd for _, seen_bhwd in _seen(windows, x_bhwd)]
        return functools.reduce(jnp.maximum, seen)
    if target_platform() == "gpu":
        return _max_of_offsets(windows, x_bhwd)
    return lax.reduce_window(
        x_bhwd,
        -np.inf,  # must be concrete, so that JAX recognizes a maximum
        lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), *pads, (0, 0)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_of_offsets(windows: _Windows, x_bhwd: Array) -> Array:
    return _max_of_offsets_forward(windows, x_bhwd)[0]


@traced_once
def _max_of_offsets_forward(windows, x_bhwd):
    (_, best_bhwd), *others = _seen(windows, x_bhwd)
    position_bhwd = jnp.zeros_like(best_bhwd, jnp.uint8)
    for position, seen_bhwd in others:
        higher_bhwd = seen_bhwd > best_bhwd
        best_bhwd = jnp.where(higher_bhwd, seen_bhwd, best_bhwd)
        position_bhwd = jnp.where(higher_bhwd, jnp.uint8(position), position_bhwd)
    return best_bhwd, position_bhwd


@traced_once
def _max_of_offsets_backward(windows, position_bhwd, dy_bhwd):
    none = (0, 0, 0)
    wide_bhwd, parts = at_least_float32(dy_bhwd), []
    for position, offsets in _offsets(windows):
        border = []
        for offset, pads, outputs, length in zip(
            offsets, windows.pads, dy_bhwd.shape[1:3], windows.lengths, strict=True
        ):
            first = offset - pads[0]
            last = first + (outputs - 1) * windows.stride
            border.append((first, length - 1 - last, windows.stride - 1))
        part_bhwd = jnp.where(position_bhwd == position, wide_bhwd, 0)
        zero = jnp.zeros((), part_bhwd.dtype)
        parts.append(lax.pad(part_bhwd, zero, (none, *border, none)))
    return (functools.reduce(jnp.add, parts).astype(dy_bhwd.dtype),)


_max_of_offsets.defvjp(_max_of_offsets_forward, _max_of_offsets_backward)


def _offsets(windows: _Windows) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields the number and the offsets of each position of a window, row by row."""
    size = range(windows.size)
    return enumerate(itertools.product(size, size))


def _seen(windows: _Windows, x_bhwd: Array) -> Iterator[tuple[int, Array]]:
    """Yields the number of each position of a window, and what it sees in all windows.

    Padding is below every number.
    """
    border = ((0, 0), *windows.pads, (0, 0))
    padded_bhwd = jnp.pad(x_bhwd, border, constant_values=-np.inf)
    span = windows.size - 1
    for position, offsets in _offsets(windows):
        rows, columns = (
            slice(begin, begin + length - span, windows.stride)
            for begin, length in zip(offsets, padded_bhwd.shape[1:3], strict=True)
        )
        yield position, padded_bhwd[:, rows, columns]
