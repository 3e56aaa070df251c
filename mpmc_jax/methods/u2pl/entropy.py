"""U2PL's unsupervised loss: the most uncertain pixels are left out.

Source: Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable
Pseudo-Labels", CVPR 2022, and compute_unsupervised_loss of its released code.
"""

import jax.numpy as jnp

from mpmc_jax.types import Array


def entropy_percentile(entropy_bhw: Array, where_bhw: Array, percent: Array) -> Array:
    """Percentiles of the entropies that count, by linear interpolation.

    Ranks are computed in the entropies' own precision: in float32, they are exact to a
    tenth of a rank among a million pixels.

    Args:
      entropy_bhw: the entropies of one group of images.
      where_bhw: bool, the pixels that count.
      percent: one or several percentages in 0..100; may be traced.

    Returns:
      The percentiles, of the shape of `percent`; NaN if no pixel counts.
    """
    counted_bhw = jnp.where(where_bhw, entropy_bhw, jnp.nan)
    # Of two types, JAX would interpolate in the narrower one.
    return jnp.nanpercentile(counted_bhw, jnp.asarray(percent, entropy_bhw.dtype))


def kept_weights(entropy_bhw: Array, where_bhw: Array, limit: Array) -> Array:
    """The pixel weights w with which U2PL's loss is sum w * cross-entropy.

    Pixels whose entropy reaches the limit are dropped. The loss is the mean over the K
    kept pixels, divided by K / N, where N counts all pixels, including void ones:
    w = N / K^2.

    Args:
      entropy_bhw: the teacher's entropies of one group of images.
      where_bhw: bool, the pixels that have a pseudo-label.
      limit: an `entropy_percentile` of the group.

    Returns:
      (b,h,w), 0 for dropped pixels.
    """
    kept_bhw = where_bhw & (entropy_bhw < limit)
    count = jnp.maximum(jnp.sum(kept_bhw, dtype=jnp.int32), 1).astype(limit.dtype)
    return jnp.where(kept_bhw, (entropy_bhw.size / count) / count, 0)
