"""AEL's confidence in each class, and the draws and weights that depend on it.

A class with low confidence is queried more often and survives re-sampling more often,
and so is trained on more often.

Source: Hu et al., "Semi-Supervised Semantic Segmentation via Adaptive Equalization
Learning", NeurIPS 2021, and its released code.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.methods.base import in_groups
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Array

MOMENTUM = 0.999


def class_confidence(logits_bhwc: Array, label_bhw: Array) -> Array:
    """Mean softmax probability of the true class, per class; 0 for an absent class.

    Args:
      logits_bhwc: the student's scores of labeled images; no gradient flows back.
      label_bhw: the labels, 255 void.

    Returns:
      (c,) in 0..1.
    """
    num_classes = logits_bhwc.shape[-1]
    logits_bhwc = jax.lax.stop_gradient(at_least_float32(logits_bhwc))
    p_bhwc = jax.nn.softmax(logits_bhwc, axis=-1)
    # A void label matches no class.
    hit_bhwc = jax.nn.one_hot(label_bhw, num_classes, dtype=jnp.bool_)
    count_c = jnp.sum(hit_bhwc, axis=(0, 1, 2), dtype=jnp.int32)
    summed_c = jnp.sum(jnp.where(hit_bhwc, p_bhwc, 0), axis=(0, 1, 2))
    return summed_c / jnp.maximum(count_c, 1).astype(summed_c.dtype)


def updated(confidence_c: Array, measured_c: Array) -> Array:
    """The running confidence, updated with the one measured in a step."""
    return MOMENTUM * confidence_c + (1 - MOMENTUM) * measured_c


def survivors(logits_bhwc: Array, confidence_c: Array, uniform: Array) -> Array:
    """Pixels that re-sampling keeps: (b,h,w) bool.

    With d_c = (1 - confidence_c) / max (1 - confidence), a pixel whose predicted
    class is c survives if u_c > 1 - d_c. Pixels of the least confident class always
    survive. If the confidence in every class is 1, d is 0 and no pixel survives.

    Args:
      logits_bhwc: the student's scores, which give the predicted class.
      confidence_c: the confidence in each class, in 0..1.
      uniform: numbers in [0, 1), shared by the batch: (c,h,w), one map per class, or
        (h,w), one map for all classes.
    """
    uncertainty_c = 1 - confidence_c
    dropped_c = 1 - uncertainty_c / (jnp.max(uncertainty_c) + 1e-12)
    predicted_bhw = jnp.argmax(jax.lax.stop_gradient(logits_bhwc), axis=-1)
    # A mask, because accelerators gather pixel by pixel.
    hit_bhwc = jax.nn.one_hot(predicted_bhw, len(uncertainty_c), dtype=jnp.bool_)
    by_class_chw = jnp.broadcast_to(uniform, (len(uncertainty_c), *uniform.shape[-2:]))
    kept_chw = by_class_chw > dropped_c[:, None, None]
    return jnp.any(hit_bhwc & jnp.moveaxis(kept_chw, 0, -1)[None], axis=-1)


def consistency_weights(
    confidence_bhw: Array, survives_bhw: Array, gamma: float = 2.0
) -> Array:
    """The pixel weights of AEL's consistency loss, which is divided by their sum.

    Pixels without a pseudo-label count in the sum as well.

    Args:
      confidence_bhw: the teacher's largest probability.
      survives_bhw: bool, see `survivors`.
      gamma: exponent of the confidence.

    Returns:
      (b,h,w).
    """
    return jnp.where(survives_bhw, confidence_bhw**gamma, 0)


def grouped_weights(
    logits_bhwc: Array, certainty_bhw: Array, confidence_gc: Array, uniform_g: Array
) -> Array:
    """The pixel weights of the consistency loss, which sum to 1 in each group.

    Args:
      logits_bhwc: the student's scores, groups one after the other.
      certainty_bhw: the teacher's largest probability.
      confidence_gc: each group's confidence in each class.
      uniform_g: each group's numbers in [0, 1), see `survivors`.

    Returns:
      (b,h,w); zeros for a group in which no pixel survives.
    """

    def one(logits, certainty, confidence, uniform) -> Array:
        survives = survivors(logits, confidence, uniform)
        weight = consistency_weights(certainty, survives)
        return weight / (jnp.sum(weight) + 1e-12)

    members = len(logits_bhwc) // len(confidence_gc)
    each = in_groups((logits_bhwc, certainty_bhw), members)
    weights = jax.vmap(one)(*each, confidence_gc, uniform_g)
    return weights.reshape(certainty_bhw.shape)


def query(
    keys_g: Array, confidence_gc: Array, draws: int, never: tuple[int, ...]
) -> Array:
    """Draws each group's classes to copy into labeled images: (g,c) bool.

    Args:
      keys_g: one key per group.
      confidence_gc: a class is drawn with probability softmax(sqrt(1 - confidence)).
      draws: number of draws with replacement; duplicates are merged.
      never: classes that are never drawn.
    """
    num_classes = confidence_gc.shape[-1]
    barred = jnp.isin(jnp.arange(num_classes), jnp.asarray(never, jnp.int32))

    def one(key: Array, confidence_c: Array) -> Array:
        scores = jnp.where(barred, -jnp.inf, jnp.sqrt(1 - confidence_c))
        drawn = jax.random.categorical(key, scores, shape=(draws,))
        return jnp.any(jax.nn.one_hot(drawn, num_classes, dtype=jnp.bool_), axis=0)

    return jax.vmap(one)(keys_g, confidence_gc)
