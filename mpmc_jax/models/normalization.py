"""Batch norm's arithmetic, with the sum and the activation that follow it.

Automatic differentiation of a mean and a two-pass variance costs four sums over the map
in the backward pass, two of which are zero or known; the formula of the paper (Ioffe
and Szegedy 2015) needs two. Norms are bound by memory and make up a third of a
step's programs.

On GPUs both sums of a pass are one reduction, and the shortcut and the activation that
follow a norm belong to it. The map is read and written 3 times in the forward pass (to
sum, to normalize, and the result) and 5 times in the backward pass (map and cotangent
to sum, both again, and the gradient); with a shortcut 4 and 7 times (also the shortcut;
the output, whose sign is that of the activation, and the shortcut's gradient).
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpmc_jax import distributed
from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.rematerialization import keep
from mpmc_jax.models.tracing import traced_once
from mpmc_jax.precision import at_least_float32

Array = jax.Array

EPSILON = 1e-5

_passes: contextvars.ContextVar[int] = contextvars.ContextVar("passes", default=1)


def passes() -> int:
    """Returns the number of passes that a batch in train mode consists of."""
    return _passes.get()


@contextlib.contextmanager
def in_passes(count: int) -> Iterator[None]:
    """Traces what runs inside for a batch of that many passes, of equal size.

    Each has a mean and a variance of its own, as if it were the whole batch.
    """
    token = _passes.set(count)
    try:
        yield
    finally:
        _passes.reset(token)


@jax.jit
def normalize(
    x_bhwc: Array, mean_c: Array, var_c: Array, scale_c: Array, bias_c: Array
) -> Array:
    """Computes (x - mean) / sqrt(var + epsilon) * scale + bias, in at least float32."""
    wide_bhwc = at_least_float32(x_bhwc)
    gain_c = scale_c * lax.rsqrt(var_c + EPSILON)
    out_bhwc = (wide_bhwc - per_channel(mean_c)) * per_channel(gain_c)
    return (out_bhwc + per_channel(bias_c)).astype(x_bhwc.dtype)


def folds() -> bool:
    """Whether a norm in evaluation mode belongs into the convolution before it.

    On GPUs, cuDNN adds bias and shortcut and applies ReLU before it writes the map,
    which no kernel of the norm's own then reads and writes. Elsewhere XLA joins the
    norm to the convolution, or the convolution dwarfs it.
    """
    return target_platform() == "gpu"


def fold(
    kernel_kkio: Array,
    bias_o: Array | None,
    mean_o: Array,
    var_o: Array,
    scale_o: Array,
    shift_o: Array,
) -> tuple[Array, Array]:
    """Makes kernel and bias of a convolution whose result `normalize` would be."""
    gain_o = scale_o * lax.rsqrt(var_o + EPSILON)
    from_mean_o = mean_o if bias_o is None else mean_o - bias_o
    return kernel_kkio * per_channel(gain_o), shift_o - from_mean_o * gain_o


class Form(NamedTuple):
    """What is computed with a norm.

    Attributes:
      axis_name: devices that hold equal parts of the batch, or None.
      slope: the activation's slope below zero: 0 for ReLU, None for no activation.
    """

    axis_name: str | None = None
    slope: float | None = None


def normalize_by_batch(
    form: Form,
    x_bhwc: Array,
    shortcut_bhwc: Array | None,
    scale_c: Array,
    bias_c: Array,
    center_c: Array,
    count: int = 1,
) -> tuple[Array, Array, Array]:
    """Returns `finish` of the normalized batch, its means and biased variances.

    They are (p,c), those of each pass of the batch over all devices, and for running
    statistics; no gradient flows through them.

    Args:
      form: devices and activation.
      x_bhwc: any float dtype; statistics are float32 at least.
      shortcut_bhwc: what is added before the activation, or None.
      scale_c, bias_c: one number per channel.
      center_c: a guess of the mean, such as the running one; see `_fused`.
      count: number of passes of equal size, one after the other in the batch.
    """

    def one_pass(x_bhwc: Array, shortcut_bhwc: Array | None) -> Any:
        if target_platform() == "gpu":
            return _fused_with_gradient(
                form, x_bhwc, shortcut_bhwc, scale_c, bias_c, center_c
            )
        out = _with_gradient(form.axis_name, x_bhwc, scale_c, bias_c)
        return finish(out[0], shortcut_bhwc, form.slope), *out[1:]

    if count == 1:
        out_bhwc, mean_c, var_c = one_pass(x_bhwc, shortcut_bhwc)
        return out_bhwc, mean_c[None], var_c[None]
    by_pass = jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:]), (x_bhwc, shortcut_bhwc)
    )
    out_pbhwc, mean_pc, var_pc = jax.vmap(one_pass)(*by_pass)
    return out_pbhwc.reshape(x_bhwc.shape), mean_pc, var_pc


def finish(x_bhwc: Array, shortcut_bhwc: Array | None, slope: float | None) -> Array:
    """Adds the shortcut if there is one, and applies the activation if any."""
    if shortcut_bhwc is not None:
        x_bhwc = x_bhwc + shortcut_bhwc
    if slope is None:
        return x_bhwc
    return jax.nn.leaky_relu(x_bhwc, slope) if slope else jax.nn.relu(x_bhwc)


@traced_once
def _by_batch(axis_name, x_bhwc, scale_c, bias_c):
    # A second pass for the variance: E[x^2] - E[x]^2 loses it where the mean is large.
    wide_bhwc = at_least_float32(x_bhwc)
    mean_c = distributed.mean(jnp.mean(wide_bhwc, axis=(0, 1, 2)), axis_name)
    squares_bhwc = jnp.square(wide_bhwc - per_channel(mean_c))
    var_c = distributed.mean(jnp.mean(squares_bhwc, axis=(0, 1, 2)), axis_name)
    mean_c, var_c = keep(mean_c), keep(var_c)
    return normalize(x_bhwc, mean_c, var_c, scale_c, bias_c), mean_c, var_c


_with_gradient = jax.custom_vjp(_by_batch, nondiff_argnums=(0,))


@traced_once
def _forward(axis_name, x_bhwc, scale_c, bias_c):
    out = _by_batch(axis_name, x_bhwc, scale_c, bias_c)
    return out, (x_bhwc, scale_c, *out[1:])


@traced_once
def _backward(axis_name, residuals, cotangents):
    x_bhwc, scale_c, mean_c, var_c = residuals
    means_2c, dscale_c, dbias_c = _gradient_sums(
        axis_name, x_bhwc, cotangents[0], mean_c, var_c
    )
    dx_bhwc = _gradient_map(x_bhwc, cotangents[0], scale_c, mean_c, var_c, means_2c)
    return dx_bhwc, dscale_c.astype(scale_c.dtype), dbias_c.astype(scale_c.dtype)


def _gradient_sums(axis_name, x_bhwc, dy_bhwc, mean_c, var_c):
    """Returns the means (2,c) that the map's gradient needs, and those of parameters.

    The latter are this device's part: the step sums gradients of parameters over
    devices.
    """
    dy_bhwc = at_least_float32(dy_bhwc)
    centered_bhwc = at_least_float32(x_bhwc) - per_channel(mean_c)
    sums_2c = _sums(dy_bhwc, dy_bhwc * centered_bhwc, by_rows=True)
    means_2c = distributed.mean(sums_2c, axis_name) / _positions(x_bhwc)
    return means_2c, sums_2c[1] * lax.rsqrt(var_c + EPSILON), sums_2c[0]


def _gradient_map(x_bhwc, dy_bhwc, scale_c, mean_c, var_c, means_2c):
    """Computes the gradient of the map from that of the normalized one."""
    centered_bhwc = at_least_float32(x_bhwc) - per_channel(mean_c)
    inverse_c = lax.rsqrt(var_c + EPSILON)
    slope_c = jnp.square(inverse_c) * means_2c[1]
    dx_bhwc = at_least_float32(dy_bhwc) - per_channel(means_2c[0])
    dx_bhwc = dx_bhwc - centered_bhwc * per_channel(slope_c)
    return (dx_bhwc * per_channel(scale_c * inverse_c)).astype(x_bhwc.dtype)


_with_gradient.defvjp(_forward, _backward)


@traced_once
def _fused(form, x_bhwc, shortcut_bhwc, scale_c, bias_c, center_c):
    """Normalizes, adds and activates; the statistics take a single reading.

    The variance is E[(x - center)^2] - (E[x] - center)^2, in float32. It loses digits
    where the mean is many deviations away from the center, as E[x^2] - E[x]^2 does
    where it is far from zero. The running mean is close after some steps, and at the
    first ones a network's mean is a few deviations away from zero.
    """
    wide_bhwc = at_least_float32(x_bhwc)
    center_c = center_c.astype(wide_bhwc.dtype)
    shifted_bhwc = wide_bhwc - per_channel(center_c)
    sums_2c = _sums(shifted_bhwc, jnp.square(shifted_bhwc))
    first_c, second_c = distributed.mean(sums_2c / _positions(x_bhwc), form.axis_name)
    mean_c = center_c + first_c
    var_c = jnp.maximum(second_c - jnp.square(first_c), 0)
    mean_c, var_c = keep(mean_c), keep(var_c)
    out_bhwc = normalize(x_bhwc, mean_c, var_c, scale_c, bias_c)
    return finish(out_bhwc, shortcut_bhwc, form.slope), mean_c, var_c


_fused_with_gradient = jax.custom_vjp(_fused, nondiff_argnums=(0,))


@traced_once
def _fused_forward(form, x_bhwc, shortcut_bhwc, scale_c, bias_c, center_c):
    out = _fused(form, x_bhwc, shortcut_bhwc, scale_c, bias_c, center_c)
    # Without a shortcut the sign of the output follows from the map, which is read
    # anyway.
    signs_bhwc = None if shortcut_bhwc is None else out[0]
    return out, (x_bhwc, signs_bhwc, scale_c, bias_c, *out[1:])


@traced_once
def _fused_backward(form, residuals, cotangents):
    """The gradient: two readings each of map and cotangent, and one writing.

    With a shortcut the output is read too, and the shortcut's gradient written.
    """
    _, _, scale_c, bias_c, mean_c, var_c = residuals
    gain_c = scale_c * lax.rsqrt(var_c + EPSILON)
    # What is cheap is computed anew, not kept from the forward pass nor for the second
    # reading: the compiler would take equal terms together and write them.
    x_bhwc, signs_bhwc, given_bhwc = lax.optimization_barrier(
        (*residuals[:2], cotangents[0])
    )

    def normalized_gradient(x_bhwc: Array, dy_bhwc: Array) -> Array:
        if form.slope is None:
            return dy_bhwc
        before_bhwc = signs_bhwc
        if before_bhwc is None:
            centered_bhwc = at_least_float32(x_bhwc) - per_channel(mean_c)
            before_bhwc = centered_bhwc * per_channel(gain_c) + per_channel(bias_c)
        # As JAX's activations have it at 0.
        above_bhwc = before_bhwc >= 0 if form.slope else before_bhwc > 0
        return jnp.where(above_bhwc, dy_bhwc, form.slope * dy_bhwc)

    dy_bhwc = normalized_gradient(x_bhwc, given_bhwc)
    means_2c, dscale_c, dbias_c = _gradient_sums(
        form.axis_name, x_bhwc, dy_bhwc, mean_c, var_c
    )
    if signs_bhwc is None:
        dshortcut_bhwc = None
        x_bhwc, given_bhwc = lax.optimization_barrier((x_bhwc, given_bhwc))
        dy_bhwc = normalized_gradient(x_bhwc, given_bhwc)
    else:
        # It is written anyway.
        dshortcut_bhwc = dy_bhwc = lax.optimization_barrier(dy_bhwc)
    dx_bhwc = _gradient_map(x_bhwc, dy_bhwc, scale_c, mean_c, var_c, means_2c)
    dscale_c, dbias_c = dscale_c.astype(scale_c.dtype), dbias_c.astype(scale_c.dtype)
    return dx_bhwc, dshortcut_bhwc, dscale_c, dbias_c, jnp.zeros_like(mean_c)


_fused_with_gradient.defvjp(_fused_forward, _fused_backward)


def _sums(first_bhwc: Array, second_bhwc: Array, *, by_rows: bool = False) -> Array:
    """Sums two maps over all positions: (2,c).

    On GPUs it is a single reduction of two operands, since XLA makes two kernels of
    each. `by_rows` sums along the rows first. XLA would divide the map into fewer parts
    and, for their sake, not compute there what is summed but write it before.
    """
    if target_platform() != "gpu":
        sums = [jnp.sum(each, axis=(0, 1, 2)) for each in (first_bhwc, second_bhwc)]
        return jnp.stack(sums)
    sums = (first_bhwc, second_bhwc)
    zero = jnp.zeros((), first_bhwc.dtype)
    for axes in ((2,), (0, 1)) if by_rows else ((0, 1, 2),):
        sums = lax.reduce(
            sums,
            (zero, zero),
            lambda sums, values: (sums[0] + values[0], sums[1] + values[1]),
            axes,
        )
    return jnp.stack(sums)


def _positions(x_bhwc: Array) -> int:
    """Counts the values of a channel."""
    return x_bhwc.size // x_bhwc.shape[-1]


def per_channel(values_c: Array) -> Array:
    """Reshapes (c,) to (1,1,1,c): ranks are never promoted silently here."""
    return values_c[None, None, None, :]
