"""Batch norm's arithmetic in train mode, with a gradient that reads each map once.

Automatic differentiation of a mean and a two-pass variance costs four sums over the map
in the backward pass, two of which are zero or known; the formula of the paper (Ioffe
and Szegedy 2015) needs two. Norms are bound by memory and make up a third of a
step's programs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpmc_jax import distributed
from mpmc_jax.models.tracing import traced_once
from mpmc_jax.precision import at_least_float32

Array = jax.Array

EPSILON = 1e-5


@jax.jit
def normalize(
    x_bhwc: Array, mean_c: Array, var_c: Array, scale_c: Array, bias_c: Array
) -> Array:
    """Computes (x - mean) / sqrt(var + epsilon) * scale + bias, in at least float32."""
    wide_bhwc = at_least_float32(x_bhwc)
    gain_c = scale_c * lax.rsqrt(var_c + EPSILON)
    out_bhwc = (wide_bhwc - per_channel(mean_c)) * per_channel(gain_c)
    return (out_bhwc + per_channel(bias_c)).astype(x_bhwc.dtype)


def normalize_by_batch(
    axis_name: str | None, x_bhwc: Array, scale_c: Array, bias_c: Array
) -> tuple[Array, Array, Array]:
    """Returns the normalized batch, its mean and biased variance, over all devices.

    The variance takes a second pass: E[x^2] - E[x]^2 loses it where the mean is large.
    Mean and variance are for running statistics; no gradient flows through them.

    Args:
      axis_name: devices that hold equal parts of the batch, or None.
      x_bhwc: any float dtype; statistics are float32 at least.
      scale_c, bias_c: one number per channel.
    """
    out: Any = _with_gradient(axis_name, x_bhwc, scale_c, bias_c)
    return out


@traced_once
def _by_batch(axis_name, x_bhwc, scale_c, bias_c):
    wide_bhwc = at_least_float32(x_bhwc)
    mean_c = distributed.mean(jnp.mean(wide_bhwc, axis=(0, 1, 2)), axis_name)
    squares_bhwc = jnp.square(wide_bhwc - per_channel(mean_c))
    var_c = distributed.mean(jnp.mean(squares_bhwc, axis=(0, 1, 2)), axis_name)
    return normalize(x_bhwc, mean_c, var_c, scale_c, bias_c), mean_c, var_c


_with_gradient = jax.custom_vjp(_by_batch, nondiff_argnums=(0,))


@traced_once
def _forward(axis_name, x_bhwc, scale_c, bias_c):
    out = _by_batch(axis_name, x_bhwc, scale_c, bias_c)
    return out, (x_bhwc, scale_c, *out[1:])


@traced_once
def _backward(axis_name, residuals, cotangents):
    x_bhwc, scale_c, mean_c, var_c = residuals
    dy_bhwc = at_least_float32(cotangents[0])
    centered_bhwc = at_least_float32(x_bhwc) - per_channel(mean_c)
    inverse_c = lax.rsqrt(var_c + EPSILON)
    sums_2c = jnp.stack(
        [
            jnp.sum(dy_bhwc, axis=(0, 1, 2)),
            jnp.sum(dy_bhwc * centered_bhwc, axis=(0, 1, 2)),
        ]
    )
    means_2c = distributed.mean(sums_2c, axis_name) / (x_bhwc.size // x_bhwc.shape[-1])
    slope_c = jnp.square(inverse_c) * means_2c[1]
    dx_bhwc = dy_bhwc - per_channel(means_2c[0]) - centered_bhwc * per_channel(slope_c)
    dx_bhwc = dx_bhwc * per_channel(scale_c * inverse_c)
    # Only this device's part: the step sums gradients of parameters over devices.
    dscale_c, dbias_c = sums_2c[1] * inverse_c, sums_2c[0]
    return (
        dx_bhwc.astype(x_bhwc.dtype),
        dscale_c.astype(scale_c.dtype),
        dbias_c.astype(scale_c.dtype),
    )


_with_gradient.defvjp(_forward, _backward)


def per_channel(values_c: Array) -> Array:
    """Reshapes (c,) to (1,1,1,c): ranks are never promoted silently here."""
    return values_c[None, None, None, :]
