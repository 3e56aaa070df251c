"""Traces a function once per shape: networks apply the same layers many times."""

import functools

import jax

# jit for a function whose first argument is static.
traced_once = functools.partial(jax.jit, static_argnums=0)
