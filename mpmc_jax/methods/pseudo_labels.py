"""Pseudo-labels and their confidence, from a network's scores."""

import jax
import jax.numpy as jnp

from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Array


def confidence_and_label(logits_bhwc: Array) -> tuple[Array, Array]:
    """The most probable class of every pixel and its softmax probability.

    Both are targets, so no gradient flows back.

    Args:
      logits_bhwc: class scores, of any float type.

    Returns:
      confidence_bhw: in 1/c..1, float32 (float64 for float64 scores).
      label_bhw: int32; the first class if several are tied.
    """
    logits_bhwc = jax.lax.stop_gradient(logits_bhwc)
    label_bhw = jnp.argmax(logits_bhwc, axis=-1).astype(jnp.int32)
    scores = at_least_float32(logits_bhwc)
    # The largest probability is exp(0) / sum, so no (b,h,w,c) quotient is needed.
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return 1 / jnp.exp(shifted).sum(axis=-1), label_bhw


# The least confidence that counts: one number, or one per class.
Threshold = float | tuple[float, ...]


def is_confident(
    confidence_bhw: Array, label_bhw: Array, threshold: Threshold
) -> Array:
    """Whether the confidence of each pseudo-label reaches its threshold: (b,h,w) bool.

    The result is unspecified where the label is void.
    """
    if isinstance(threshold, float | int):
        return confidence_bhw >= threshold
    of_class = jnp.asarray(threshold, confidence_bhw.dtype)
    return confidence_bhw >= jnp.take(of_class, label_bhw, mode="clip")


def entropy(logits_bhwc: Array) -> Array:
    """The entropy -sum_c p_c log(p_c + 1e-10) of each pixel: (b,h,w), no gradient."""
    logits_bhwc = jax.lax.stop_gradient(at_least_float32(logits_bhwc))
    p_bhwc = jax.nn.softmax(logits_bhwc, axis=-1)
    return -jnp.sum(p_bhwc * jnp.log(p_bhwc + 1e-10), axis=-1)


def image_confidence(logits_bhwc: Array) -> Array:
    """AugSeg's confidence in whole images (section 3.2 of its paper).

    The mean over pixels of max_c p_c (1 - H(p) / ln C), with 1e-10 inside the
    entropy's logarithm; no gradient flows back. It is 1 for a single class.

    Returns:
      (b,) in 0..1, float32 (float64 for float64 scores).
    """
    confidence_bhw, _ = confidence_and_label(logits_bhwc)
    most = jnp.log(float(max(logits_bhwc.shape[-1], 2)))
    certainty_bhw = 1 - entropy(logits_bhwc) / most
    return jnp.mean(confidence_bhw * certainty_bhw, axis=(1, 2))
