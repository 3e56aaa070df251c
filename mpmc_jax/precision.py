"""The floating-point type in which sums and exponentials are computed."""

import jax.numpy as jnp

from mpmc_jax.types import Array


def at_least_float32(x: Array) -> Array:
    """Half precision becomes float32; wider floats stay as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
