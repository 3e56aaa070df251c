"""Resizing as two matrix products, one per axis, or position by position.

Most published networks interpolate with align_corners=True, which `jax.image.resize`
does not offer (it samples at half-pixel centers, as Segmenter and the published
resizing of position embeddings do). A product with a (out,in) matrix of few non-zeros
per row costs more arithmetic than a gather but is faster: its gradient is a product
too, whereas that of a gather is a scatter-add.

On GPUs a product would write the whole result, which for logits at the image's size is
the largest array of a step, and transpose it. Crops of 4 k + 1 pixels are enlarged by a
whole number, 4: each interval of the source becomes as many positions, whose values are
sums of the interval's corners. The compiler computes them, forward and backward, inside
what uses them, and never writes them. At other ratios of at least 1 positions gather
their corners, and backward each corner gathers the few positions that it gave to, so
that nothing is scattered.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.tracing import traced_once
from mpmc_jax.precision import at_least_float32

Array = jax.Array


def interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Makes (target, source) float64 weights of align-corners linear interpolation."""
    matrix = np.zeros((target, source))
    step = (source - 1) / (target - 1) if target > 1 else 0.0
    position = np.arange(target) * step
    low = np.clip(np.floor(position).astype(int), 0, max(source - 2, 0))
    high = np.minimum(low + 1, source - 1)
    fraction = position - low
    rows = np.arange(target)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def _symbolic_matrix(source: int, target: int) -> Array:
    """Computes `interpolation_matrix` of sizes that are not known while tracing.

    Positions are quotients of whole numbers, exact to the last digit of float32.
    """
    intervals = jnp.maximum(jnp.asarray(target) - 1, 1)
    numerator = jnp.arange(target) * (source - 1)
    low = numerator // intervals
    fraction = (numerator - low * intervals) / intervals
    distance = jnp.arange(source)[None, :] - low[:, None]
    return jnp.where(
        distance == 0,
        1 - fraction[:, None],
        jnp.where(distance == 1, fraction[:, None], 0),
    )


def resize_align_corners(
    x_bhwc: Array, size: tuple[int, int], gradient_dtype: str | None = None
) -> Array:
    """Resizes bilinearly so that corner pixels coincide: (b,h,w,c) -> (b,*size,c).

    Enlarging by a whole number on GPUs rounds the gradient to `gradient_dtype`, where
    that is narrower, and sums it in float32: arrays of scores of all pixels are a
    step's largest. Nothing else rounds it.
    """
    _, height, width, _ = x_bhwc.shape
    if (height, width) == tuple(size):
        return x_bhwc
    if (height, width) == (1, 1):
        return jnp.broadcast_to(x_bhwc, (x_bhwc.shape[0], *size, x_bhwc.shape[3]))
    if any(map(export.is_symbolic_dim, (height, width, *size))):
        rows, columns = (
            _symbolic_matrix(*each) for each in zip((height, width), size, strict=True)
        )
        return resize_by(rows, columns, x_bhwc)
    ratio = _whole_ratio((height, width), size)
    if ratio and target_platform() == "gpu":
        return _enlarge(_Whole(ratio, gradient_dtype), x_bhwc)
    axes = _Enlargement(height, size[0]), _Enlargement(width, size[1])
    if target_platform() == "gpu" and all(1 < n <= m for n, m in axes):
        return _enlarge_by_gathers(axes, x_bhwc)
    rows = interpolation_matrix(height, size[0])
    return resize_by(rows, interpolation_matrix(width, size[1]), x_bhwc)


def resize_half_pixel(x_bhwc: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly with half-pixel centers: (b,h,w,c) -> (b,*size,c)."""
    _, height, width, _ = x_bhwc.shape
    if (height, width) == tuple(size):
        return x_bhwc
    rows = half_pixel_matrix(height, size[0])
    return resize_by(rows, half_pixel_matrix(width, size[1]), x_bhwc)


def half_pixel_matrix(
    source: int, target: int, *, scale: float | None = None, cubic: bool = False
) -> np.ndarray:
    """Makes (target, source) float64 weights of interpolation at half-pixel centers.

    As in PyTorch without antialiasing: borders are repeated, and the cubic kernel has
    a = -0.75.

    Args:
      source: number of given positions.
      target: number of positions to compute.
      scale: targets per source for the coordinates; None for target / source.
      cubic: cubic interpolation instead of linear.
    """
    position = (np.arange(target) + 0.5) / (scale or target / source) - 0.5
    low = np.floor(position)
    matrix = np.zeros((target, source))
    for offset in range(-1, 3) if cubic else range(2):
        distance = np.abs(position - low - offset)
        weight = _cubic(distance) if cubic else 1 - distance
        index = np.clip(low + offset, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), index), weight)
    return matrix


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Computes the kernel of cubic convolution at distances 0 to 2 (Keys 1981)."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, far)


def resize_by(
    rows: np.ndarray | Array, columns: np.ndarray | Array, x_bhwc: Array
) -> Array:
    """Multiplies both axes of a map by matrices (target, source), in its dtype.

    The products run at the highest precision, since rounded interpolation weights would
    shift logits.
    """
    rows_uh, columns_vw = (jnp.asarray(each, x_bhwc.dtype) for each in (rows, columns))
    # Columns first: the larger, second product then works on whole rows.
    highest = lax.Precision.HIGHEST
    x_bhwc = jnp.einsum("vw,bhwc->bhvc", columns_vw, x_bhwc, precision=highest)
    return jnp.einsum("uh,bhvc->buvc", rows_uh, x_bhwc, precision=highest)


def _whole_ratio(source: tuple[int, int], target: tuple[int, int]) -> int:
    """Returns by how many positions each source interval is divided; 0 if by parts."""
    intervals = [(s - 1, t - 1) for s, t in zip(source, target, strict=True)]
    ratios = {t // s if s and t % s == 0 else 0 for s, t in intervals}
    return ratios.pop() if len(ratios) == 1 else 0


class _Enlargement(NamedTuple):
    """An axis that is enlarged.

    Attributes:
      source, target: positions before and after.
    """

    source: int
    target: int

    def corners(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lists, for both neighbors, their indices and weights of all targets."""
        position = np.arange(self.target) * ((self.source - 1) / (self.target - 1))
        low = np.minimum(position.astype(int), self.source - 2)
        return [(low, 1 - position + low), (low + 1, position - low)]

    def users(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lists the targets that each source is a neighbor of, and their weights.

        There are as many entries as a source has targets at most; the rest weighs 0.
        """
        matrix = interpolation_matrix(self.source, self.target).T
        most = int(np.count_nonzero(matrix, axis=1).max())
        first = (matrix != 0).argmax(axis=1)
        found = []
        for offset in range(most):
            index = np.minimum(first + offset, self.target - 1)
            inside = first + offset < self.target
            weight = matrix[np.arange(self.source), index] * inside
            found.append((index, weight))
        return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _enlarge_by_gathers(
    axes: tuple[_Enlargement, _Enlargement], x_bhwc: Array
) -> Array:
    """Enlarges (b,h,w,c) by ratios of at least 1."""
    wide_bhwc = at_least_float32(x_bhwc)
    rows, columns = (axis.corners() for axis in axes)
    out = _gathered(_gathered(wide_bhwc, rows, 1), columns, 2)
    return out.astype(x_bhwc.dtype)


def _enlarge_by_gathers_forward(
    axes: tuple[_Enlargement, _Enlargement], x_bhwc: Array
) -> tuple[Array, None]:
    return _enlarge_by_gathers(axes, x_bhwc), None


@traced_once
def _enlarge_by_gathers_backward(
    axes: tuple[_Enlargement, _Enlargement], residuals: None, dy_bhwc: Array
) -> tuple[Array]:
    """Collects what each source gave; no two sources write to one place."""
    del residuals
    rows, columns = (axis.users() for axis in axes)
    out = _gathered(_gathered(at_least_float32(dy_bhwc), columns, 2), rows, 1)
    return (out.astype(dy_bhwc.dtype),)


_enlarge_by_gathers.defvjp(_enlarge_by_gathers_forward, _enlarge_by_gathers_backward)


def _gathered(
    x_bhwc: Array, parts: list[tuple[np.ndarray, np.ndarray]], axis: int
) -> Array:
    """Sums rows or columns with weights: each part has an index and a weight of all."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    out = jnp.zeros((), x_bhwc.dtype)
    for index, weight in parts:
        taken_bhwc = jnp.take(x_bhwc, index, axis=axis, mode="clip")
        out = out + taken_bhwc * jnp.asarray(weight.reshape(shape), x_bhwc.dtype)
    return out


class _Whole(NamedTuple):
    """An enlargement by a whole number.

    Attributes:
      ratio: positions per interval of the source.
      gradient_dtype: what the gradient is rounded to, where that is narrower; or None.
    """

    ratio: int
    gradient_dtype: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _enlarge(by: _Whole, x_bhwc: Array) -> Array:
    """Enlarges (b,h,w,c) to (b,ratio(h-1)+1,ratio(w-1)+1,c)."""
    ratio = by.ratio
    batch, height, width, channels = x_bhwc.shape
    # The last row and column begin intervals of their own, of which the first position
    # counts.
    edges = ((0, 0), (0, 1), (0, 1), (0, 0))
    padded_bhwc = jnp.pad(at_least_float32(x_bhwc), edges, mode="edge")
    out = jnp.zeros((), padded_bhwc.dtype)
    for row, column, weight_rs in _corners(ratio, padded_bhwc.dtype):
        corner_bhwc = padded_bhwc[:, row : row + height, column : column + width]
        out = (
            out
            + corner_bhwc[:, :, None, :, None] * weight_rs[None, None, :, None, :, None]
        )
    out_bhwc = out.reshape(batch, height * ratio, width * ratio, channels)
    rows, columns = ratio * (height - 1) + 1, ratio * (width - 1) + 1
    return out_bhwc[:, :rows, :columns].astype(x_bhwc.dtype)


def _enlarge_forward(by: _Whole, x_bhwc: Array) -> tuple[Array, None]:
    return _enlarge(by, x_bhwc), None


@traced_once
def _enlarge_backward(by: _Whole, residuals: None, dy_bhwc: Array) -> tuple[Array]:
    """Sums what each corner gave to the positions of its intervals, in one reading."""
    del residuals
    ratio, gradient_dtype = by
    dtype = dy_bhwc.dtype
    if gradient_dtype and jnp.finfo(gradient_dtype).bits < jnp.finfo(dtype).bits:
        # Without the barrier XLA would keep the wider dtype.
        dy_bhwc = lax.optimization_barrier(dy_bhwc.astype(gradient_dtype))
    batch, rows, columns, channels = dy_bhwc.shape
    height, width = (rows - 1) // ratio + 1, (columns - 1) // ratio + 1
    beyond = ((0, 0), (0, ratio - 1), (0, ratio - 1), (0, 0))
    wide_bhwc = jnp.pad(at_least_float32(dy_bhwc), beyond)
    split = wide_bhwc.reshape(batch, height, ratio, width, ratio, channels)
    corners = list(_corners(ratio, wide_bhwc.dtype))
    zeros = (jnp.zeros((), wide_bhwc.dtype),) * len(corners)
    sums = lax.reduce(
        tuple(
            split * weight_rs[None, None, :, None, :, None]
            for _, _, weight_rs in corners
        ),
        zeros,
        lambda sums, values: tuple(s + v for s, v in zip(sums, values, strict=True)),
        (2, 4),
    )
    dx_bhwc = jnp.zeros((batch, height, width, channels), wide_bhwc.dtype)
    for (row, column, _), sum_bhwc in zip(corners, sums, strict=True):
        # A far corner of the last interval lies beyond the map and got nothing.
        moved = jnp.pad(sum_bhwc, ((0, 0), (row, 0), (column, 0), (0, 0)))
        dx_bhwc = dx_bhwc + moved[:, :height, :width]
    return (dx_bhwc.astype(dtype),)


_enlarge.defvjp(_enlarge_forward, _enlarge_backward)


def _corners(ratio: int, dtype: jnp.dtype) -> Iterator[tuple[int, int, Array]]:
    """Yields the corners of an interval: offsets, and weights at its positions."""
    far = np.arange(ratio) / ratio
    weights = (1 - far, far)
    for row, column in itertools.product((0, 1), (0, 1)):
        yield row, column, jnp.asarray(np.outer(weights[row], weights[column]), dtype)
