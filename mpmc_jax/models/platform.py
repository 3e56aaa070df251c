"""The kind of device that networks are traced for.

Some operations have different forms for CPUs, GPUs and TPUs, with the same values.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax

_platform: contextvars.ContextVar[str] = contextvars.ContextVar("platform")


def target_platform() -> str:
    """Returns "cpu", "gpu", "tpu", or "any" for forms that suit all of them."""
    return _platform.get(None) or jax.default_backend()


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Traces what runs inside for this platform instead of JAX's default one."""
    token = _platform.set(platform)
    jax.clear_caches()  # What was traced for another platform must not be reused.
    try:
        yield
    finally:
        _platform.reset(token)
        jax.clear_caches()


def keep_layout(tree: Any) -> Any:
    """Keeps the order in memory that arrays have outside of the compiled step, on GPUs.

    cuDNN takes kernels in another order than parameters are stored in. XLA would carry
    that order on to the optimizer, and transpose all that the optimizer reads and
    writes. Around the networks only the kernels and their gradients are transposed,
    while they are cast. A flat array has no other order, and nothing is moved across
    the barrier.
    """
    if target_platform() != "gpu":
        return tree

    def keep(x: jax.Array) -> jax.Array:
        return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)

    return jax.tree.map(lambda x: keep(x) if x.ndim > 1 else x, tree)
