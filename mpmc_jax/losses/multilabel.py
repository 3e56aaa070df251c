"""Losses of a patch classifier that predicts the classes in a patch (eq. 3-6).

Every loss is a mean over classes and valid patches (row D2 of docs/deviations.md). The
paper prints a sum over patches, which would grow with the resolution.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.losses.reduction import (
    GlobalSum,
    identity,
    masked_mean,
    ratio,
)
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Array


def _asymmetric_focal(
    logits_bhwc: Array, target_bhwc: Array, *, gamma_pos: float, gamma_neg: float
) -> Array:
    """Equation 3 with its minus sign (D1) for every patch, (b,h,w).

    With s the logit of the correct answer, sigmoid(-s) is the probability of the wrong
    one, and both cases of eq. 3 are -sigmoid(-s)**gamma * log sigmoid(s). The power is
    computed in log space, where 0**0 and its gradient cannot occur.
    """
    logits_bhwc = at_least_float32(logits_bhwc)
    target_bhwc = target_bhwc.astype(jnp.bool_)
    right_bhwc = jnp.where(target_bhwc, logits_bhwc, -logits_bhwc)
    gamma_bhwc = jnp.where(
        target_bhwc,
        jnp.asarray(gamma_pos, logits_bhwc.dtype),
        jnp.asarray(gamma_neg, logits_bhwc.dtype),
    )
    focus_bhwc = jnp.exp(gamma_bhwc * jax.nn.log_sigmoid(-right_bhwc))
    return jnp.mean(-focus_bhwc * jax.nn.log_sigmoid(right_bhwc), axis=-1)


def asymmetric_focal_loss(
    logits: Array,
    targets: Array,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 1.0,
    where: Array | None = None,
    count: Array | int | None = None,
    global_sum: GlobalSum = identity,
) -> Array:
    """The asymmetric focal loss of labeled patches, eq. 3-4.

    Args:
      logits: (b,h,w,c) patch logits.
      targets: (b,h,w,c) bool (or 0/1), whether the class occurs in the patch.
      gamma_pos: exponent of (1 - q) for classes that occur.
      gamma_neg: exponent of q for classes that do not.
      where: (b,h,w) bool, the valid patches, or None for all.
      count: () the divisor, or None for the number of valid patches; 1 for the sum.
      global_sum: sums an array over devices.

    Returns:
      A scalar; 0 if no patch is valid.
    """
    loss_bhw = _asymmetric_focal(
        logits, targets, gamma_pos=gamma_pos, gamma_neg=gamma_neg
    )
    return _mean(loss_bhw, where, count, global_sum)


def _binary_cross_entropy(
    logits_bhwc: Array, target_bhwc: Array, weights_bhwc: Array | None = None
) -> Array:
    """The inner sum of eq. 6 for every patch, (b,h,w); targets are probabilities."""
    logits_bhwc = at_least_float32(logits_bhwc)
    target_bhwc = target_bhwc.astype(logits_bhwc.dtype)
    loss_bhwc = -(
        target_bhwc * jax.nn.log_sigmoid(logits_bhwc)
        + (1 - target_bhwc) * jax.nn.log_sigmoid(-logits_bhwc)
    )
    if weights_bhwc is not None:
        loss_bhwc = loss_bhwc * weights_bhwc
    return jnp.mean(loss_bhwc, axis=-1)


def binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    where: Array | None = None,
    count: Array | int | None = None,
    global_sum: GlobalSum = identity,
) -> Array:
    """The weighted binary cross-entropy with soft targets, eq. 6.

    Args:
      logits: (b,h,w,c) patch logits of the student.
      targets: (b,h,w,c) probabilities of the teacher.
      weights: (b,h,w,c) lambda_m, or None for 1. They scale the loss, and are not
        part of the divisor.
      where: (b,h,w) bool, the valid patches, or None for all.
      count: () the divisor, or None for the number of valid patches; 1 for the sum.
      global_sum: sums an array over devices.

    Returns:
      A scalar; 0 if no patch is valid.
    """
    loss_bhw = _binary_cross_entropy(logits, targets, weights)
    return _mean(loss_bhw, where, count, global_sum)


def _mean(
    loss_bhw: Array,
    where: Array | None,
    count: Array | int | None,
    global_sum: GlobalSum,
) -> Array:
    """Sums the losses of the valid patches and divides by their number or `count`."""
    valid_bhw = jnp.ones(loss_bhw.shape, jnp.bool_) if where is None else where
    if count is None:
        return masked_mean(loss_bhw, valid_bhw, global_sum)
    return ratio(global_sum(jnp.sum(jnp.where(valid_bhw, loss_bhw, 0))), count)
