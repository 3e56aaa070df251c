"""U2PL's unsupervised loss: the most uncertain pixels are left out.

Source: Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable
Pseudo-Labels", CVPR 2022; its released compute_unsupervised_loss.
"""

import jax.numpy as jnp

from mpmc_jax.types import Array


def entropy_percentile(entropy_bhw: Array, where_bhw: Array, percent: Array) -> Array:
    """The percentile of the entropies that count, by linear interpolation.

    Positions are computed in the entropies' own precision: in float32 up to a tenth
    of a rank among a million pixels.

    Args:
      entropy_bhw: of one group of images.
      where_bhw: bool, the pixels that count.
      percent: in 0..100, one or several; may be traced.

    Returns:
      As many entropies; NaN where no pixel counts.
    """
    counted_bhw = jnp.where(where_bhw, entropy_bhw, jnp.nan)
    return jnp.nanpercentile(counted_bhw, percent)


def kept_weights(entropy_bhw: Array, where_bhw: Array, limit: Array) -> Array:
    """Weights w with which U2PL's loss is sum w * cross-entropy.

    Pixels whose entropy reaches the limit are dropped. The mean over the K others is
    divided by the share that they are, K of all N pixels (void ones included):
    w = N / K^2.

    Args:
      entropy_bhw: the teacher's, of one group of images.
      where_bhw: bool, the pixels that have a pseudo-label.
      limit: an `entropy_percentile` of the group.

    Returns:
      (b,h,w), zeros where no pixel is kept.
    """
    kept_bhw = where_bhw & (entropy_bhw < limit)
    count = jnp.maximum(jnp.sum(kept_bhw, dtype=jnp.int32), 1).astype(limit.dtype)
    return jnp.where(kept_bhw, (entropy_bhw.size / count) / count, 0)
