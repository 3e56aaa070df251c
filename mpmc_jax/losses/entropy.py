"""U2PL's unsupervised loss: the most uncertain pixels are left out.

Source: Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable
Pseudo-Labels", CVPR 2022; its released compute_unsupervised_loss.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.losses.pixel import labelled_pixels
from mpmc_jax.losses.reduction import at_least_float32
from mpmc_jax.types import Array


def entropy(logits_bhwc: Array) -> Array:
    """-sum_c p_c log(p_c + 1e-10) of every pixel, in nats: (b,h,w), no gradient."""
    logits_bhwc = jax.lax.stop_gradient(at_least_float32(logits_bhwc))
    p_bhwc = jax.nn.softmax(logits_bhwc, axis=-1)
    return -jnp.sum(p_bhwc * jnp.log(p_bhwc + 1e-10), axis=-1)


def entropy_percentile(entropy_bhw: Array, where_bhw: Array, percent: Array) -> Array:
    """The percentile of the entropies that count, by linear interpolation.

    Positions are computed in the entropies' own precision: in float32 up to a tenth
    of a rank among a million pixels.

    Args:
      entropy_bhw: of one group of images.
      where_bhw: bool, the pixels that count.
      percent: in 0..100; may be traced.

    Returns:
      A scalar; NaN where no pixel counts.
    """
    counted_bhw = jnp.where(where_bhw, entropy_bhw, jnp.nan)
    return jnp.nanpercentile(counted_bhw, percent)


def percentile_weights(
    teacher_logits_bhwc: Array, label_bhw: Array, percent: Array
) -> Array:
    """Weights w with which U2PL's loss is sum w * cross-entropy.

    Pixels at or above the percentile of the teacher's entropy are dropped. The mean
    over the K others is divided by the share that they are, K of all N pixels (void
    ones included): w = N / K^2.

    Args:
      teacher_logits_bhwc: of one group of images, which share the percentile.
      label_bhw: pseudo-labels; 255 and anything >= c never counts.
      percent: percentile from which pixels are dropped, 0..100.

    Returns:
      (b,h,w), zeros where no pixel is kept; without gradient.
    """
    entropy_bhw = entropy(teacher_logits_bhwc)
    known_bhw = labelled_pixels(label_bhw, teacher_logits_bhwc.shape[-1])
    limit = entropy_percentile(entropy_bhw, known_bhw, percent)
    kept_bhw = known_bhw & (entropy_bhw < limit)
    count = jnp.maximum(jnp.sum(kept_bhw, dtype=jnp.int32), 1).astype(limit.dtype)
    return jnp.where(kept_bhw, (label_bhw.size / count) / count, 0)
