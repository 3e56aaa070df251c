"""Convolution, in the forms that are fast where it is compiled for.

XLA's convolutions are slow on CPUs in two cases. The gradient of a kernel becomes a
convolution whose window is the whole image, at a tenth of the forward pass's rate;
matrix products are 2 to 6 times faster. And a dilated kernel is multiplied with all the
padding that it reaches into, which is most of its inputs at the rates of an atrous
pyramid: on the 21 x 21 features of crop 321, one product per tap with the inputs inside
the image is 1.6, 3 and 5 times faster at rates 6, 12 and 18.

On GPUs, cuDNN has no gradient of a dilated kernel, for which XLA takes a convolution
whose window is the whole image. At dilation d this gradient is that of an undilated
kernel on the d x d phases of the image, each d-th row and column, which cuDNN has. A
1x1 convolution stays one: as a product, it would be transposed around. The exception is
a network's last one, see `score`.

TPUs use XLA's convolution, and products for 1x1 kernels. Programs for any platform use
XLA's convolution alone, whose shapes may be unknown while tracing.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.tracing import traced_once

Array = jax.Array

# A dilated kernel is computed tap by tap where that saves more than a quarter of its
# products. A dense kernel never is: XLA's convolution is faster there at any size.
_WORTH = 0.75


class _Geometry(NamedTuple):
    """Stride, dilation and padding of a kernel, the same along both axes."""

    stride: int
    dilation: int
    padding: int


# XLA pads operands of products in bfloat16 to multiples of this.
_PRODUCT_SIDE = 8


class _Span(NamedTuple):
    """Where a tap reads the image along an axis, and not its padding."""

    inputs: slice
    outputs: int
    # Outputs before and after those, as `lax.pad` takes them.
    border: tuple[int, int, int]


def convolve(
    x_bhwi: Array, kernel_kkio: Array, *, stride: int, dilation: int, padding: int
) -> Array:
    """Convolves (b,h,w,i) with (k,k,i,o), with `padding` zeros on every side."""
    geometry = _Geometry(stride, dilation, padding)
    platform = target_platform()
    if platform == "cpu":
        return _on_cpu(geometry, x_bhwi, kernel_kkio)
    if platform == "gpu":
        return _on_gpu(geometry, x_bhwi, kernel_kkio)
    if kernel_kkio.shape[0] == 1 and not padding and platform == "tpu":
        x_bhwi = x_bhwi[:, ::stride, ::stride]
        return lax.dot_general(x_bhwi, kernel_kkio[0, 0], (((3,), (0,)), ((), ())))
    return _convolution(geometry, x_bhwi, kernel_kkio)


def multiplies_halves(x_bhwi: Array, kernel_kkio: Array) -> bool:
    """Whether `score` computes a network's last convolution.

    There, maps in bfloat16 are multiplied as they are and summed in float32, as TPUs do
    anyway. cuDNN has no such convolution: it would write and read a float32 copy of the
    map, and one of its gradient.
    """
    halves = x_bhwi.dtype == jnp.bfloat16 and kernel_kkio.shape[0] == 1
    return halves and target_platform() == "gpu"


@jax.custom_vjp
def score(x_bhwi: Array, kernel_11io: Array, bias_o: Array) -> Array:
    """Multiplies every position of a bfloat16 map with the kernel, in float32."""
    return _score_forward(x_bhwi, kernel_11io, bias_o)[0]


@jax.jit
def _score_forward(x_bhwi, kernel_11io, bias_o):
    *positions, channels = x_bhwi.shape
    features = kernel_11io.shape[-1]
    kernel_io = _padded_columns(kernel_11io[0, 0].astype(x_bhwi.dtype))
    # Padded where the map is made, and not by a copy of it. XLA would join maps that
    # are multiplied by one kernel.
    x_ni = _padded_rows(x_bhwi.reshape(-1, channels))
    x_ni, kernel_io = lax.optimization_barrier((x_ni, kernel_io))
    scores_no = jnp.dot(x_ni, kernel_io, preferred_element_type=jnp.float32)
    scores_no = scores_no[: math.prod(positions), :features] + bias_o[None]
    # What enlarges scores reads each several times.
    scores_no = lax.optimization_barrier(scores_no)
    return scores_no.reshape(*positions, features), (x_ni, kernel_io)


@jax.jit
def _score_backward(residuals, dy_bhwo):
    x_ni, kernel_io = residuals
    features = dy_bhwo.shape[-1]
    dy_no = dy_bhwo.reshape(-1, features)
    dbias_o = jnp.sum(dy_no, axis=0)
    dy_no = _padded_columns(dy_no.astype(x_ni.dtype))
    dkernel_io = lax.dot_general(
        x_ni,
        _padded_rows(dy_no),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    one = _Geometry(stride=1, dilation=1, padding=0)
    dy_bhwo = dy_no.reshape(*dy_bhwo.shape[:3], -1)
    dx_bhwi = _convolution(one, dy_bhwo, kernel_io.T[None, None])
    return dx_bhwi, dkernel_io[None, None, :, :features], dbias_o


score.defvjp(_score_forward, _score_backward)


def _padded_rows(x_nc: Array) -> Array:
    return jnp.pad(x_nc, ((0, -x_nc.shape[0] % _PRODUCT_SIDE), (0, 0)))


def _padded_columns(x_nc: Array) -> Array:
    return jnp.pad(x_nc, ((0, 0), (0, -x_nc.shape[1] % _PRODUCT_SIDE)))


def _convolution(geometry: _Geometry, x_bhwi: Array, kernel_kkio: Array) -> Array:
    stride, dilation, padding = geometry
    return lax.conv_general_dilated(
        x_bhwi,
        kernel_kkio,
        window_strides=(stride, stride),
        padding=((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _on_gpu(geometry: _Geometry, x_bhwi: Array, kernel_kkio: Array) -> Array:
    if geometry.dilation > 1 and geometry.stride == 1:
        return _with_gradient_on_gpu(geometry, x_bhwi, kernel_kkio)
    return _convolution(geometry, x_bhwi, kernel_kkio)


@traced_once
def _on_cpu(geometry: _Geometry, x_bhwi: Array, kernel_kkio: Array) -> Array:
    size = kernel_kkio.shape[0]
    _, height, width, _ = x_bhwi.shape
    rows, columns = _spans(geometry, size, height), _spans(geometry, size, width)
    used = _used(rows) * _used(columns)
    sparse = geometry.dilation > 1 and 0 < used < _WORTH
    if size == 1 or sparse:
        return _sum_of_taps(rows, columns, x_bhwi, kernel_kkio)
    return _with_tap_gradient(geometry, x_bhwi, kernel_kkio)


def _spans(geometry: _Geometry, size: int, length: int) -> list[_Span]:
    """Computes the span of each tap of a kernel along an axis of `length` inputs."""
    stride, dilation, padding = geometry
    outputs = (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    spans = []
    for offset in range(-padding, dilation * size - padding, dilation):
        # Output y sees the input at y * stride + offset.
        begin = min(outputs, max(0, -(offset // stride)))
        end = min(outputs, max(begin, (length - 1 - offset) // stride + 1))
        first, last = (max(0, y * stride + offset) for y in (begin, end))
        inputs = slice(first, last, stride)
        spans.append(_Span(inputs, end - begin, (begin, outputs - end, 0)))
    return spans


def _used(spans: list[_Span]) -> float:
    """Computes the share of an axis' products that are not with padding."""
    before, after, _ = spans[0].border
    every = len(spans) * (before + spans[0].outputs + after)
    return sum(span.outputs for span in spans) / every


def _sum_of_taps(
    rows: list[_Span], columns: list[_Span], x_bhwi: Array, kernel_kkio: Array
) -> Array:
    # On small features the outer taps of a high rate read padding alone.
    products = [
        _product_of_tap(row, column, x_bhwi, kernel_kkio[i, j])
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
        if row.outputs and column.outputs
    ]
    return functools.reduce(jnp.add, products)


def _product_of_tap(row: _Span, column: _Span, x_bhwi: Array, tap_io: Array) -> Array:
    """Returns (b,h',w',o), zero where the tap reads padding."""
    seen_bhwi = x_bhwi[:, row.inputs, column.inputs]
    # The product has two axes: with four, XLA writes the weight's gradient at half the
    # rate.
    part_no = seen_bhwi.reshape(-1, seen_bhwi.shape[-1]) @ tap_io
    part_bhwo = part_no.reshape(*seen_bhwi.shape[:-1], tap_io.shape[-1])
    none = (0, 0, 0)
    border = (none, row.border, column.border, none)
    return lax.pad(part_bhwo, jnp.zeros((), part_bhwo.dtype), border)


def _with_kernel_gradient(kernel_gradient: Callable) -> Callable:
    """Makes XLA's convolution with another gradient of its kernel."""
    convolution = jax.custom_vjp(_convolution, nondiff_argnums=(0,))

    @traced_once
    def forward(geometry, x_bhwi, kernel_kkio):
        return _convolution(geometry, x_bhwi, kernel_kkio), (x_bhwi, kernel_kkio)

    @traced_once
    def backward(geometry, residuals, dy_bhwo):
        x_bhwi, kernel_kkio = residuals
        of_input = functools.partial(_convolution, geometry, kernel_kkio=kernel_kkio)
        (dx_bhwi,) = jax.linear_transpose(of_input, x_bhwi)(dy_bhwo)
        return dx_bhwi, kernel_gradient(geometry, x_bhwi, kernel_kkio.shape[0], dy_bhwo)

    convolution.defvjp(forward, backward)
    return convolution


def _gradient_by_taps(
    geometry: _Geometry, x_bhwi: Array, size: int, dy_bhwo: Array
) -> Array:
    """Computes (k,k,i,o): products of shifted inputs with dy, a row of taps at once.

    One product per tap is no faster, and takes 1.5 times as long to compile. A row's
    shifted inputs are `size` times as large as the input. XLA would compute those of
    all rows and layers in the forward pass, where the inputs are available, and hold
    them until dy exists: two fifths of a step's memory. So each row waits for the one
    before.
    """
    stride, dilation, padding = geometry
    _, height, width, features = dy_bhwo.shape
    channels = x_bhwi.shape[-1]
    dy_no = dy_bhwo.reshape(-1, features)

    def seen(axis: int, tap: int, outputs: int, of_bhwi: Array) -> Array:
        begin = tap * dilation
        end = begin + (outputs - 1) * stride + 1
        return lax.slice_in_dim(of_bhwi, begin, end, stride, axis)

    def of_row(tap: int, before: Array) -> Array:
        padded_bhwi = _padded(x_bhwi, padding, _zero_after(before))
        row_bhwi = seen(1, tap, height, padded_bhwi)
        shifted = [seen(2, column, width, row_bhwi) for column in range(size)]
        seen_nki = jnp.stack(shifted, axis=3).reshape(-1, size * channels)
        return (seen_nki.T @ dy_no).reshape(size, channels, features)

    rows, before = [], dy_bhwo
    for tap in range(size):
        before = of_row(tap, before)
        rows.append(before)
    return jnp.stack(rows)


def _gradient_by_phases(
    geometry: _Geometry, x_bhwi: Array, size: int, dy_bhwo: Array
) -> Array:
    """Computes (k,k,i,o) as the gradient of an undilated kernel on all phases.

    Tap t of the output at y reads the input at y + t d - p. With y = d m + r, phase r
    of the output at m reads phase r of the input at m + t - p / d, rounded down; the
    rest of p is padded.
    """
    _, dilation, padding = geometry
    # XLA might compute the input's phases in the forward pass, and hold them.
    x_bhwi, dy_bhwo = lax.optimization_barrier((x_bhwi, dy_bhwo))
    whole, rest = divmod(padding, dilation)
    counts = [-(-length // dilation) for length in dy_bhwo.shape[1:3]]
    reached = [count + size - 1 - 2 * whole for count in counts]
    x_nmmi = _phases(x_bhwi, dilation, rest, reached)
    dy_nmmo = _phases(dy_bhwo, dilation, 0, counts)
    undilated = _Geometry(stride=1, dilation=1, padding=whole)
    shape = (size, size, x_bhwi.shape[-1], dy_bhwo.shape[-1])
    of_kernel = functools.partial(_convolution, undilated, x_nmmi)
    kernel = jax.ShapeDtypeStruct(shape, x_bhwi.dtype)
    (gradient_kkio,) = jax.linear_transpose(of_kernel, kernel)(dy_nmmo)
    return gradient_kkio


def _gradient_on_gpu(
    geometry: _Geometry, x_bhwi: Array, size: int, dy_bhwo: Array
) -> Array:
    """Computes (k,k,i,o) on the phases, or tap by tap where those are mostly padding.

    On the 21 x 21 features of crop 321, the phases of rate 18 have 36 x 36 positions,
    and the tap at a corner sees 3 x 3.
    """
    if 2 * geometry.dilation <= min(x_bhwi.shape[1:3]):
        return _gradient_by_phases(geometry, x_bhwi, size, dy_bhwo)
    rows, columns = (_spans(geometry, size, side) for side in x_bhwi.shape[1:3])
    shape = (x_bhwi.shape[-1], dy_bhwo.shape[-1])

    def of_tap(row: _Span, column: _Span) -> Array:
        if not (row.outputs and column.outputs):
            return jnp.zeros(shape, x_bhwi.dtype)
        top, left = row.border[0], column.border[0]
        seen_bhwi = x_bhwi[:, row.inputs, column.inputs]
        dy = dy_bhwo[:, top : top + row.outputs, left : left + column.outputs]
        positions = (0, 1, 2)
        return lax.dot_general(seen_bhwi, dy, ((positions, positions), ((), ())))

    taps = [of_tap(row, column) for row in rows for column in columns]
    return jnp.stack(taps).reshape(size, size, *shape)


def _phases(x_bhwc: Array, step: int, before: int, counts: list[int]) -> Array:
    """Takes every `step`-th row and column as an image: (step * step * b, *counts, c).

    `before` zeros come first, and last as many as the counts ask for; what is beyond
    them is left out.
    """
    batch, *lengths, channels = x_bhwc.shape
    none = (0, 0, 0)
    border = [
        (before, step * count - before - length, 0)
        for length, count in zip(lengths, counts, strict=True)
    ]
    zero = jnp.zeros((), x_bhwc.dtype)
    x_bhwc = lax.pad(x_bhwc, zero, (none, *border, none))
    rows, columns = counts
    split = x_bhwc.reshape(batch, rows, step, columns, step, channels)
    phases = split.transpose(2, 4, 0, 1, 3, 5)
    return phases.reshape(-1, rows, columns, channels)


def _zero_after(array: Array) -> Array:
    """Returns 0 (NaN if `array` begins with one), which XLA cannot know before `array`.

    XLA for CPUs drops an optimization_barrier before it orders instructions.
    """
    return jnp.minimum(jnp.abs(array.ravel()[0]), 0)


def _padded(x_bhwi: Array, padding: int, value: Array) -> Array:
    border = (padding, padding, 0)
    return lax.pad(x_bhwi, value, ((0, 0, 0), border, border, (0, 0, 0)))


_with_tap_gradient = _with_kernel_gradient(_gradient_by_taps)
_with_gradient_on_gpu = _with_kernel_gradient(_gradient_on_gpu)
