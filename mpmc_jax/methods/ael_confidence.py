"""AEL's confidence in each class, and what follows from it.

A class in which the student has little confidence is queried more often, survives
re-sampling more often, and so is trained on more. Source: Hu et al., "Semi-Supervised
Semantic Segmentation via Adaptive Equalization Learning", NeurIPS 2021; its release.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.losses.reduction import at_least_float32
from mpmc_jax.types import Array

MOMENTUM = 0.999


def class_confidence(logits_bhwc: Array, label_bhw: Array) -> Array:
    """Mean softmax probability of the true class, by class; 0 for an absent one.

    Args:
      logits_bhwc: the student's scores of labelled images; no gradient flows back.
      label_bhw: their labels, 255 void.

    Returns:
      (c,) in 0..1.
    """
    num_classes = logits_bhwc.shape[-1]
    logits_bhwc = jax.lax.stop_gradient(at_least_float32(logits_bhwc))
    p_bhwc = jax.nn.softmax(logits_bhwc, axis=-1)
    # A void label hits no class.
    hit_bhwc = jax.nn.one_hot(label_bhw, num_classes, dtype=jnp.bool_)
    count_c = jnp.sum(hit_bhwc, axis=(0, 1, 2), dtype=jnp.int32)
    summed_c = jnp.sum(jnp.where(hit_bhwc, p_bhwc, 0), axis=(0, 1, 2))
    return summed_c / jnp.maximum(count_c, 1).astype(summed_c.dtype)


def moved(confidence_c: Array, measured_c: Array) -> Array:
    """The running confidence after a step's."""
    return MOMENTUM * confidence_c + (1 - MOMENTUM) * measured_c


def survivors(logits_bhwc: Array, confidence_c: Array, uniform_chw: Array) -> Array:
    """Pixels that re-sampling keeps: (b,h,w) bool.

    With d_c = (1 - confidence_c) / max (1 - confidence), a pixel whose predicted
    class is c survives if u_c > 1 - d_c: always, for the least confident class. Where
    every class is certain none does: d is 0 for all.

    Args:
      logits_bhwc: the student's; its own prediction decides.
      confidence_c: of each class, in 0..1.
      uniform_chw: numbers in [0, 1), a field for each class, shared by the batch.
    """
    lack_c = 1 - confidence_c
    dropped_c = 1 - lack_c / (jnp.max(lack_c) + 1e-12)
    predicted_bhw = jnp.argmax(jax.lax.stop_gradient(logits_bhwc), axis=-1)
    kept_chw = uniform_chw > dropped_c[:, None, None]
    return jnp.take_along_axis(kept_chw, predicted_bhw, axis=0)


def consistency_weights(
    confidence_bhw: Array, survives_bhw: Array, gamma: float = 2.0
) -> Array:
    """Weights of AEL's consistency, whose divisor is their sum plus 1e-12.

    Pixels without a pseudo-label count in the divisor as well.

    Args:
      confidence_bhw: the teacher's largest probability.
      survives_bhw: bool, see `survivors`.
      gamma: exponent of the confidence.

    Returns:
      (b,h,w).
    """
    return jnp.where(survives_bhw, confidence_bhw**gamma, 0)
