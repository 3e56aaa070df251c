"""Losses of dense class scores: cross-entropy, its hard-example variant (OHEM), focal.

Focal loss: Lin et al., ICCV 2017.
"""

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
    """Pixels labeled with one of the classes 0..c-1, not void: (b,h,w) bool."""
    in_range = (label_bhw >= 0) & (label_bhw < num_classes)
    return in_range & (label_bhw != ignore_label)


def confident_pixels(view: View) -> Array:
    """Pixels of a view whose pseudo-label counts in its loss: (b,h,w) bool.

    They lie in the view's region, have a class and a positive weight.
    """
    known_bhw = labeled_pixels(view.target, view.logits.shape[-1])
    return (view.weight > 0) & view.region.valid & known_bhw


def class_counts(label_bhw: Array, where_bhw: Array, num_classes: int) -> Array:
    """Number of pixels of each class where `where_bhw` is True: (c,) int32."""
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
    """Per-pixel factors that give every class present the same total weight.

        factor[pixel of class c] = N / (K n_c)

    with n_c the number of counted pixels of class c, N its sum over classes and K the
    number of classes present. The factors of each class sum to N / K and those of all
    classes to N, as they do without factors.

    Args:
      label_bhw: integer classes; values outside 0..c-1 are void.
      where_bhw: bool, the pixels that count.
      num_classes: c.
      global_sum: sums an array over devices.

    Returns:
      (b,h,w), without gradient; 0 for pixels that do not count or are void.
    """
    counts = class_counts(label_bhw, where_bhw, num_classes)
    counts = jax.lax.stop_gradient(global_sum(counts.astype(float)))
    present = jnp.maximum(jnp.sum(counts > 0), 1)
    factor_c = counts.sum() / (present * jnp.maximum(counts, 1))
    return jnp.where(where_bhw, value_of_class(label_bhw, factor_c), 0)


def value_of_class(label_bhw: Array, value_c: Array) -> Array:
    """The value of each pixel's class, (b,h,w); 0 for void."""
    # A masked sum, not a gather, see `_log_loss_forward`.
    hit_bhwc = jax.nn.one_hot(label_bhw, len(value_c), dtype=jnp.bool_)
    return jnp.sum(jnp.where(hit_bhwc, value_c[None, None, None], 0), axis=-1)


def pixel_cross_entropy(
    logits_bhwc: Array, label_bhw: Array, *, ignore_label: int = IGNORE_LABEL
) -> Array:
    """The cross-entropy of every pixel.

    Args:
      logits_bhwc: class scores; bfloat16 is cast to float32, float64 is kept.
      label_bhw: integer classes; `ignore_label` and values outside 0..c-1 are void.
      ignore_label: the void label.

    Returns:
      (b,h,w) losses in nats; void pixels have value and gradient exactly 0.
    """
    logits_bhwc = at_least_float32(logits_bhwc)
    valid_bhw = labeled_pixels(label_bhw, logits_bhwc.shape[-1], ignore_label)
    return jnp.where(valid_bhw, _log_loss(logits_bhwc, label_bhw), 0)


@jax.custom_vjp
def _log_loss(logits_bhwc: Array, label_bhw: Array) -> Array:
    """Computes -log softmax of the labeled class, where there is one.

    The gradient, softmax - one hot, is computed from the logits and a number per pixel,
    so that nothing else of their size is kept.
    """
    return _log_loss_forward(logits_bhwc, label_bhw)[0]


def _log_loss_forward(logits_bhwc, label_bhw):
    # Relative to the largest score, so that a common offset costs no precision.
    peak_bhw1 = jnp.max(logits_bhwc, axis=-1, keepdims=True)
    score_bhwc = logits_bhwc - peak_bhw1
    # A masked sum, not a gather: void labels are never used as an index.
    hit_bhwc = jax.nn.one_hot(label_bhw, logits_bhwc.shape[-1], dtype=jnp.bool_)
    own_bhw = jnp.sum(jnp.where(hit_bhwc, score_bhwc, 0), axis=-1)
    log_sum_bhw = jnp.log(jnp.sum(jnp.exp(score_bhwc), axis=-1))
    return log_sum_bhw - own_bhw, (logits_bhwc, label_bhw, peak_bhw1, log_sum_bhw)


def _log_loss_backward(residuals, dloss_bhw):
    logits_bhwc, label_bhw, peak_bhw1, log_sum_bhw = residuals
    softmax_bhwc = jnp.exp(logits_bhwc - peak_bhw1 - log_sum_bhw[..., None])
    hit_bhwc = jax.nn.one_hot(label_bhw, logits_bhwc.shape[-1], dtype=jnp.bool_)
    own_bhwc = hit_bhwc.astype(softmax_bhwc.dtype)
    return dloss_bhw[..., None] * (softmax_bhwc - own_bhwc), None


_log_loss.defvjp(_log_loss_forward, _log_loss_backward)


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
    """The weighted sum of the cross-entropy, divided by the *number* of pixels.

    Weights scale the numerator only, so weights of 1 give the plain mean (eq. 5:
    lambda_s reduces the loss of a pixel without renormalizing the others).

    Args:
      logits: (b,h,w,c) class scores.
      labels: (b,h,w) integer classes; `ignore_label` and values >= c are void.
      weights: (b,h,w) weights of the pixels, or None for 1.
      where: (b,h,w) bool, the pixels that count, or None for all. Void never counts.
      count: () the divisor, or None for the number of counted pixels. If the batch is
        split into parts, pass the number of pixels in the whole batch.
      ignore_label: the void label.
      global_sum: sums an array over devices.

    Returns:
      A scalar; 0 if no pixel counts.
    """
    loss_bhw = pixel_cross_entropy(logits, labels, ignore_label=ignore_label)
    counted_bhw = labeled_pixels(labels, logits.shape[-1], ignore_label)
    if where is not None:
        counted_bhw = counted_bhw & where
    return _mean(loss_bhw, counted_bhw, weights, count, global_sum)


def _mean(
    loss_bhw: Array,
    counted_bhw: Array,
    weights_bhw: Array | None,
    count: Array | None,
    global_sum: GlobalSum,
) -> Array:
    """Sums the weighted losses and divides by `count`, or by the number of pixels."""
    if weights_bhw is not None:
        loss_bhw = loss_bhw * weights_bhw
    if count is None:
        return masked_mean(loss_bhw, counted_bhw, global_sum)
    return ratio(global_sum(jnp.sum(jnp.where(counted_bhw, loss_bhw, 0))), count)


def focal_loss(
    logits: Array,
    labels: Array,
    *,
    gamma: float = 2.0,
    weights: Array | None = None,
    count: Array | None = None,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """The focal loss -(1 - p)^gamma log p, with p the probability of the true class.

    Weights and divisor are those of `cross_entropy`, which it equals with gamma 0. The
    paper's alpha is the class's weight.

    Args:
      logits: (b,h,w,c) class scores.
      labels: (b,h,w) integer classes; `ignore_label` and values >= c are void.
      gamma: at least 0; the larger, the less pixels count that are predicted well.
      weights, count, ignore_label, global_sum: see `cross_entropy`.

    Returns:
      A scalar; 0 if no pixel counts.
    """
    loss_bhw = pixel_cross_entropy(logits, labels, ignore_label=ignore_label)
    # Where the loss is 0, as of void pixels, a power below 1 has no finite gradient.
    some_bhw = loss_bhw > 0
    wrong_bhw = jnp.where(some_bhw, -jnp.expm1(-loss_bhw), 1)
    focal_bhw = jnp.where(some_bhw, wrong_bhw**gamma * loss_bhw, 0)
    counted_bhw = labeled_pixels(labels, logits.shape[-1], ignore_label)
    return _mean(focal_bhw, counted_bhw, weights, count, global_sum)


def ohem_keep(
    logits: Array,
    labels: Array,
    *,
    threshold: float,
    min_kept: int,
    group_size: int | None = None,
    ignore_label: int = IGNORE_LABEL,
) -> Array:
    """The hard pixels: those whose true class has a low probability.

    With q the softmax probability of the true class, and 1 for void pixels, a valid
    pixel is kept if q <= max(threshold, the min_kept-th smallest q). All valid pixels
    are kept if there are fewer than min_kept, or if min_kept is 0 (OHEM is off).

    Args:
      logits: (b,h,w,c) class scores.
      labels: (b,h,w) integer classes.
      threshold: pixels with at most this probability are hard.
      min_kept: the least number of pixels to keep; may exceed the array's size.
      group_size: pixels are ranked within groups of this many examples, as published
        settings do within one GPU's batch; None ranks them over the whole array.
      ignore_label: the void label.

    Returns:
      (b,h,w) bool, without gradient.
    """
    if group_size is not None:
        rule = {"threshold": threshold, "min_kept": min_kept}
        keep = partial(ohem_keep, **rule, ignore_label=ignore_label)
        groups = (labels.shape[0] // group_size, group_size)
        kept_gbhw = jax.vmap(keep)(
            logits.reshape(groups + logits.shape[1:]),
            labels.reshape(groups + labels.shape[1:]),
        )
        return kept_gbhw.reshape(labels.shape)
    valid_bhw = labeled_pixels(labels, logits.shape[-1], ignore_label)
    if not 0 < min_kept <= labels.size:
        return valid_bhw
    logits = jax.lax.stop_gradient(logits)
    loss_bhw = pixel_cross_entropy(logits, labels, ignore_label=ignore_label)
    own_bhw = jnp.exp(-loss_bhw)  # 1 where void, since the loss is 0 there
    hard_bhw = own_bhw <= jnp.maximum(_kth_smallest(own_bhw, min_kept), threshold)
    too_few = jnp.sum(valid_bhw, dtype=jnp.int32) < min_kept
    return valid_bhw & (hard_bhw | too_few)


# Jitted, because outside jit each call would compile the loop again.
@partial(jax.jit, static_argnames="k")
def _kth_smallest(values: Array, k: int) -> Array:
    """The k-th smallest (from 1) of all values, which must not be negative.

    Nonnegative floats are ordered like their bit patterns, so the answer is found bit
    by bit, by counting: exact, and 20 times faster than a sort on CPUs.
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
    group_size: int | None = None,
    weights: Array | None = None,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """The mean cross-entropy over the hard pixels of all groups; a scalar.

    `ohem_keep` chooses the hard pixels, whatever their weights, and explains the
    arguments; `weights` and `global_sum` are those of `cross_entropy`.
    """
    keep_bhw = ohem_keep(
        logits,
        labels,
        threshold=threshold,
        min_kept=min_kept,
        group_size=group_size,
        ignore_label=ignore_label,
    )
    return cross_entropy(
        logits,
        labels,
        weights=weights,
        where=keep_bhw,
        ignore_label=ignore_label,
        global_sum=global_sum,
    )
