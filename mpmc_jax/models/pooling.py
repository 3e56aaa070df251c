"""Average pooling of patch features at several scales, at stride 1."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mpmc_jax.precision import at_least_float32

Array = jax.Array

# As published; and all that the patch classifier takes: 3 is for patches of a vision
# transformer, which are as far apart as four positions of layer1.
WINDOWS = (1, 7, 19)
VALID_WINDOWS = (1, 3, 7, 19)


def average_pool(z_bhwd: Array, window: int) -> Array:
    """Averages over a centered window x window square; keeps the shape (b,h,w,d).

    Zero padding counts: the sum is divided by window^2 at the border too, as the
    published MPMC does. Two one-dimensional sums cost 1/40 of one over the square on a
    CPU and agree up to rounding. They run in float32, or float64 for such input, and
    are rounded once: a 361-term sum in bfloat16 is off by 2 %.

    Raises:
      ValueError: the window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"pooling window {window}: must be odd and positive")
    if window == 1:
        return z_bhwd
    sum_bhwd = at_least_float32(z_bhwd)
    for axis in (1, 2):
        dimensions = [1] * 4
        dimensions[axis] = window
        padding = [(0, 0)] * 4
        padding[axis] = (window // 2, window // 2)
        # The initial value must be concrete: otherwise JAX does not recognize a sum,
        # and there is no gradient.
        sum_bhwd = lax.reduce_window(
            sum_bhwd, 0.0, lax.add, dimensions, (1,) * 4, padding
        )
    return (sum_bhwd / window**2).astype(z_bhwd.dtype)


def multi_scale_pool(z_bhwd: Array, windows: Sequence[int] = WINDOWS) -> Array:
    """Concatenates the pooled maps in the given order: (b,h,w,d*len(windows))."""
    return jnp.concatenate([average_pool(z_bhwd, w) for w in windows], axis=-1)
