"""Networks repeat themselves: what has a shape again is not traced again."""

import functools

import jax

# Of a function whose first argument is static.
traced_once = functools.partial(jax.jit, static_argnums=0)
