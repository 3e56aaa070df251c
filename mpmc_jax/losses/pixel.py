"""Losses of dense class scores: cross-entropy and its hard-example variant (OHEM)."""

from functools import partial

import jax
import jax.numpy as jnp

from mpmc_jax.losses.reduction import (
    GlobalSum,
    identity,
    masked_mean,
    ratio,
)
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import IGNORE_LABEL, Array, View


def labeled_pixels(
    label_bhw: Array, num_classes: int, ignore_label: int = IGNORE_LABEL
) -> Array:
    """Pixels that carry a class, (b,h,w) bool: neither `ignore_label` nor >= c."""
    in_range = (label_bhw >= 0) & (label_bhw < num_classes)
    return in_range & (label_bhw != ignore_label)


def confident_pixels(view: View) -> Array:
    """Pixels of a view whose pseudo-label counts in its loss, (b,h,w) bool.

    They lie in the view's region, carry a class and have a positive weight.
    """
    known_bhw = labeled_pixels(view.target, view.logits.shape[-1])
    return (view.weight > 0) & view.region.valid & known_bhw


def class_counts(label_bhw: Array, where_bhw: Array, num_classes: int) -> Array:
    """(c,) int32, how many of the pixels at which `where_bhw` holds have each class."""
    classes_c111 = jnp.arange(num_classes)[:, None, None, None]
    hit_cbhw = (label_bhw[None] == classes_c111) & where_bhw[None]
    return jnp.sum(hit_cbhw, axis=(1, 2, 3), dtype=jnp.int32)


def class_balance(
    label_bhw: Array,
    where_bhw: Array,
    num_classes: int,
    *,
    global_sum: GlobalSum = identity,
) -> Array:
    """Factors with which every class that occurs weighs the same.

        factor[pixel of class c] = N / (K n_c)

    with n_c the counted pixels of class c, N their sum over classes and K the number
    of classes that have any: the factors of a class add up to N / K, those of all
    classes to N, as without factors.

    Args:
      label_bhw: integer classes; what is outside 0..c-1 is void.
      where_bhw: bool, the pixels that count.
      num_classes: c.
      global_sum: sums over devices.

    Returns:
      (b,h,w), without gradient; 0 where a pixel does not count or is void.
    """
    counts = class_counts(label_bhw, where_bhw, num_classes)
    counts = jax.lax.stop_gradient(global_sum(counts.astype(float)))
    present = jnp.maximum(jnp.sum(counts > 0), 1)
    factor_c = counts.sum() / (present * jnp.maximum(counts, 1))
    # Class by class, not a gather, see `pixel_cross_entropy`.
    hit_bhwc = jax.nn.one_hot(label_bhw, num_classes, dtype=jnp.bool_)
    factor_bhw = jnp.sum(jnp.where(hit_bhwc, factor_c[None, None, None], 0), axis=-1)
    return jnp.where(where_bhw, factor_bhw, 0)


def pixel_cross_entropy(
    logits_bhwc: Array, label_bhw: Array, *, ignore_label: int = IGNORE_LABEL
) -> Array:
    """Cross-entropy of every pixel.

    Args:
      logits_bhwc: class scores; bf16 is computed in float32, float64 stays.
      label_bhw: integer classes. `ignore_label` and anything outside 0..c-1 is void.
      ignore_label: the void label.

    Returns:
      (b,h,w) losses in nats; void pixels have value and gradient exactly 0.
    """
    logits_bhwc = at_least_float32(logits_bhwc)
    num_classes = logits_bhwc.shape[-1]
    valid_bhw = labeled_pixels(label_bhw, num_classes, ignore_label)
    # Relative to the largest score, so that a common offset costs no digits.
    peak_bhw1 = jax.lax.stop_gradient(jnp.max(logits_bhwc, axis=-1, keepdims=True))
    score_bhwc = logits_bhwc - peak_bhw1
    # A masked sum, not a gather: its gradient is elementwise instead of a scatter,
    # and a void label can never be an index.
    hit_bhwc = jax.nn.one_hot(label_bhw, num_classes, dtype=jnp.bool_)
    own_bhw = jnp.sum(jnp.where(hit_bhwc, score_bhwc, 0), axis=-1)
    loss_bhw = jnp.log(jnp.sum(jnp.exp(score_bhwc), axis=-1)) - own_bhw
    return jnp.where(valid_bhw, loss_bhw, 0)


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    weights: Array | None = None,
    where: Array | None = None,
    count: Array | None = None,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """Sum of weights * cross-entropy over the *number* of counted pixels.

    Weights scale the numerator only (eq. 5: lambda_s lowers a pixel's share, it does
    not renormalize the others'), so weights of 1 give the plain mean.

    Args:
      logits: (b,h,w,c) class scores.
      labels: (b,h,w) integer classes; `ignore_label` and anything >= c is void.
      weights: (b,h,w) weights of the pixels, or None for 1.
      where: (b,h,w) bool, the pixels that count, or None for all. Void never counts.
      count: () the number to divide by, or None for that of the counted pixels. A
        batch in several parts has the number of the whole batch here.
      ignore_label: the void label.
      global_sum: sums over devices.

    Returns:
      A scalar; 0 where no pixel counts.
    """
    loss_bhw = pixel_cross_entropy(logits, labels, ignore_label=ignore_label)
    counted_bhw = labeled_pixels(labels, logits.shape[-1], ignore_label)
    if where is not None:
        counted_bhw = counted_bhw & where
    if weights is not None:
        loss_bhw = loss_bhw * weights
    if count is None:
        return masked_mean(loss_bhw, counted_bhw, global_sum)
    return ratio(global_sum(jnp.sum(jnp.where(counted_bhw, loss_bhw, 0))), count)


def ohem_keep(
    logits: Array,
    labels: Array,
    *,
    threshold: float,
    min_kept: int,
    ignore_label: int = IGNORE_LABEL,
) -> Array:
    """The hard pixels of an array: those whose own class is improbable.

    With q the softmax probability of the true class and 1 where void, a valid pixel
    is kept if q <= max(threshold, the min_kept-th smallest q). If there are no
    min_kept valid pixels, or min_kept is 0 (the rule is off), all valid ones are.

    The rule ranks over the whole array. Published settings ranked within one GPU's
    batch: for (g,s,h,w,c) in g groups use `jax.vmap(ohem_keep)` and take one mean.

    Args:
      logits: (b,h,w,c) class scores.
      labels: (b,h,w) integer classes.
      threshold: probability at or below which a pixel is hard.
      min_kept: how many pixels to keep at least; may exceed the array.
      ignore_label: the void label.

    Returns:
      (b,h,w) bool, without gradient.
    """
    valid_bhw = labeled_pixels(labels, logits.shape[-1], ignore_label)
    if not 0 < min_kept <= labels.size:
        return valid_bhw
    logits = jax.lax.stop_gradient(logits)
    loss_bhw = pixel_cross_entropy(logits, labels, ignore_label=ignore_label)
    own_bhw = jnp.exp(-loss_bhw)  # 1 where void, since the loss is 0 there
    hard_bhw = own_bhw <= jnp.maximum(_kth_smallest(own_bhw, min_kept), threshold)
    too_few = jnp.sum(valid_bhw, dtype=jnp.int32) < min_kept
    return valid_bhw & (hard_bhw | too_few)


@partial(jax.jit, static_argnames="k")  # outside jit, the loop would compile anew
def _kth_smallest(values: Array, k: int) -> Array:
    """The k-th smallest (from 1) of all values, which must not be negative.

    Such floats are ordered as their bits are, so the answer is found bit by bit, by
    counting: 20 times faster than a sort on CPUs, and exact.
    """
    width = 8 * values.dtype.itemsize
    integer = jnp.dtype(f"int{width}")
    bits = jax.lax.bitcast_convert_type(values, integer)

    def add_bit(i: Array, found: Array) -> Array:
        one = jnp.ones((), integer)
        trial = found | jnp.left_shift(one, (width - 2 - i).astype(integer))
        below = jnp.sum(bits < trial, dtype=jnp.int32)
        return jnp.where(below < k, trial, found)

    found = jax.lax.fori_loop(0, width - 1, add_bit, jnp.zeros((), integer))
    return jax.lax.bitcast_convert_type(found, values.dtype)


def ohem_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    threshold: float,
    min_kept: int,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """Mean cross-entropy over the hard pixels, see `ohem_keep`; a scalar."""
    keep_bhw = ohem_keep(
        logits,
        labels,
        threshold=threshold,
        min_kept=min_kept,
        ignore_label=ignore_label,
    )
    return cross_entropy(
        logits, labels, where=keep_bhw, ignore_label=ignore_label, global_sum=global_sum
    )
