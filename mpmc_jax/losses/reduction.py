"""How per-element losses become scalars, on one device or on many.

A mean over a batch that is spread over devices is a global sum over a global count.
Losses take the sum as an argument, `total`: the identity on one device, a sum over
devices whose gradient stays local in a parallel step.
"""

from collections.abc import Callable

import jax.numpy as jnp

from mpmc_jax.types import Array

GlobalSum = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """The `total` of a batch that lies on one device."""
    return x


def at_least_float32(x: Array) -> Array:
    """Half precision becomes float32, wider floats stay: losses are not for bf16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def ratio(numerator: Array, count: Array) -> Array:
    """The quotient, with 0 for an empty mean (whose numerator is 0)."""
    return numerator / jnp.maximum(count, 1).astype(numerator.dtype)


def masked_mean(values: Array, where: Array, total: GlobalSum = identity) -> Array:
    """Mean of the values at which `where` (bool, same shape) holds; 0 if nowhere."""
    # Integer counts: float32 stops counting at 2**24, which 26 crops of 801 exceed.
    count = total(jnp.sum(where, dtype=jnp.int32))
    return ratio(total(jnp.sum(jnp.where(where, values, 0))), count)
