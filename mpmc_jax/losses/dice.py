"""The soft Dice loss of dense class scores, weighted pixel by pixel.

See row D21 of docs/deviations.md.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.losses.pixel import labeled_pixels
from mpmc_jax.losses.reduction import GlobalSum, identity
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import IGNORE_LABEL, Array

SMOOTHING = 1e-5


def dice_loss(
    logits: Array,
    labels: Array,
    *,
    weights: Array | None = None,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """Mean of Dice_c over all classes, background included.

        Dice_c = 1 - (2 sum w s t + 1e-5) / (sum w s^2 + sum w t^2 + 1e-5)

    with s the softmax and t the one-hot label. All sums run over the whole batch: the
    Dice of a class is not averaged over images.

    Args:
      logits: (b,h,w,c) class scores; bfloat16 is cast to float32, float64 is kept.
      labels: (b,h,w) integer classes; `ignore_label` and values >= c are void.
      weights: (b,h,w) w, or None for 1. Void pixels never count.
      ignore_label: the void label.
      global_sum: sums an array over devices.

    Returns:
      A scalar; 0 if no pixel counts.
    """
    logits = at_least_float32(logits)
    num_classes = logits.shape[-1]
    valid_bhw = labeled_pixels(labels, num_classes, ignore_label)
    ones_bhw = jnp.ones(labels.shape, logits.dtype)
    given_bhw = ones_bhw if weights is None else weights.astype(logits.dtype)
    weight_bhw1 = jnp.where(valid_bhw, given_bhw, 0)[..., None]
    s_bhwc = jax.nn.softmax(logits, axis=-1)
    t_bhwc = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)

    def summed(values_bhwc: Array) -> Array:
        return global_sum(jnp.sum(weight_bhw1 * values_bhwc, axis=(0, 1, 2)))

    overlap_c = 2 * summed(s_bhwc * t_bhwc)
    size_c = summed(jnp.square(s_bhwc)) + summed(t_bhwc)
    return jnp.mean(1 - (overlap_c + SMOOTHING) / (size_c + SMOOTHING))
