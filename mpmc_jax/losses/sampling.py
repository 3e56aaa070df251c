"""Uniform draws from the True elements of masks, with static shapes."""

import jax.numpy as jnp

from mpmc_jax.types import Array


def nth_true(mask_n: Array, order: Array) -> Array:
    """Position of the mask's `order`-th True, counted from 0."""
    return jnp.searchsorted(jnp.cumsum(mask_n, dtype=jnp.int32), order + 1)


def pick(uniform: Array, count: Array) -> Array:
    """Maps a number in [0, 1) to an integer in 0..count-1; 0 if count is 0."""
    index = jnp.floor(uniform * count).astype(jnp.int32)
    return jnp.clip(index, 0, jnp.maximum(count - 1, 0))
