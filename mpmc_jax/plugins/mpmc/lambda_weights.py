"""The adaptive weights lambda_s (pixels) and lambda_m (patches) of section 3.3.

The confidence gamma of eq. 5 is the patch classifier's, of each class in each patch.
D numbers are rows of docs/deviations.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.losses.pixel import labeled_pixels
from mpmc_jax.losses.reduction import GlobalSum, identity, ratio
from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.mpmc.patches import nearest_patch
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Array


def _softmax_of_probabilities(logits_bhwc: Array) -> Array:
    return jax.nn.softmax(jax.nn.sigmoid(logits_bhwc), axis=-1)


# How the confidence gamma of a patch follows from its logits (D4). The paper:
# softmax_prob.
CONFIDENCES: dict[str, Callable[[Array], Array]] = {
    "softmax_prob": _softmax_of_probabilities,
    "softmax_logit": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
}
# How weights are scaled (not the scales of the patches): divided by nothing, by the
# patch's largest gamma, or by the mean over the micro-batch.
SCALES = ("none", "max", "mean")
# And, for lambda_s, the mean over the pixels of the same pseudo-class: not the paper's.
PIXEL_SCALES = (*SCALES, "class_mean")


def adaptive_weights(
    patch_logits: Array,
    pseudo_labels: Array,
    *,
    confidence: str,
    scale: str,
    patch_scale: str = "none",
    field: ReceptiveField | None = None,
    where: Array | None = None,
    valid: Array | None = None,
    global_sum: GlobalSum = identity,
) -> tuple[Array, Array]:
    """Computes weights of pixels and patches from the teacher's patch predictions.

    With gamma the confidence of eq. 5, lambda_m[r,c] = gamma[r,c], divided as
    `patch_scale` says, and lambda_s[pixel] = gamma[its patch, its class], divided as
    `scale` says. A pixel belongs to the patch of the nearest center (D5).

    Args:
      patch_logits: (b,h,w,C) teacher logits.
      pseudo_labels: (b,H,W) integer classes. Pixels without a class (255 or >= C) get
        lambda_s 0: no loss is computed there.
      confidence: a key of `CONFIDENCES`.
      scale: one of `PIXEL_SCALES`; "mean" makes the mean of lambda_s over the pixels
        that `where` names equal 1, "class_mean" that over those of each class.
      patch_scale: one of `SCALES`; "mean" makes the mean of lambda_m over all classes
        and the patches of `valid` equal 1 (D26).
      field: the tap's receptive field; None for one centered on pixel 0 with the
        stride that the sizes suggest, see `nearest_patch`.
      where: (b,H,W) bool, the pixels over which means are taken; None for all with a
        class. "none" and "max" do not read it.
      valid: (b,h,w) bool, the patches over which "mean" is taken; None for all.
      global_sum: sums an array over devices.

    Returns:
      lambda_s (b,H,W) and lambda_m (b,h,w,C), without gradient, float32 or wider.

    Raises:
      ValueError: on an unknown confidence or scale.
    """
    _check_known("confidence", confidence, tuple(CONFIDENCES))
    _check_known("scale", scale, PIXEL_SCALES)
    _check_known("patch_scale", patch_scale, SCALES)
    logits_bhwc = jax.lax.stop_gradient(at_least_float32(patch_logits))
    gamma_bhwc = CONFIDENCES[confidence](logits_bhwc)
    scaled_bhwc = _relative(gamma_bhwc, scale)
    lambda_bhw, labeled_bhw = _at_pixels(scaled_bhwc, pseudo_labels, field)
    counted_bhw = labeled_bhw if where is None else labeled_bhw & where
    if scale == "mean":
        lambda_bhw = _over_mean(lambda_bhw, counted_bhw, global_sum)
    elif scale == "class_mean":
        for number in range(patch_logits.shape[-1]):
            same_bhw = pseudo_labels == number
            lambda_bhw = _over_mean(lambda_bhw, counted_bhw, global_sum, same_bhw)
    patch_bhwc = _relative(gamma_bhwc, patch_scale)
    if patch_scale == "mean":
        counted = True if valid is None else valid[..., None]
        counted_bhwc = jnp.broadcast_to(counted, patch_bhwc.shape)
        patch_bhwc = _over_mean(patch_bhwc, counted_bhwc, global_sum)
    return lambda_bhw, patch_bhwc


def _relative(gamma_bhwc: Array, scale: str) -> Array:
    """Divides by the largest gamma of each patch where `scale` is "max"."""
    if scale != "max":
        return gamma_bhwc
    largest_bhw1 = gamma_bhwc.max(axis=-1, keepdims=True)
    # Sigmoids of a patch may all underflow.
    return gamma_bhwc / jnp.maximum(largest_bhw1, jnp.finfo(gamma_bhwc.dtype).tiny)


def _over_mean(
    values: Array, counted: Array, global_sum: GlobalSum, among: Array | bool = True
) -> Array:
    """Divides the values `among` by the mean of those counted, over all devices."""
    counted = counted & among
    count = global_sum(jnp.sum(counted, dtype=jnp.int32))
    mean = ratio(global_sum(jnp.sum(jnp.where(counted, values, 0))), count)
    # If nothing is counted, or all of it underflows, nothing is divided.
    divides = (mean > jnp.finfo(mean.dtype).tiny) & among
    return jnp.where(divides, values / mean, values)


def shuffled_by_class(weights: Array, classes: Array) -> Array:
    """Permutes the weights among the pixels of one class of one image.

    An ablation: every class keeps its weights, and which pixel has which says nothing
    any more. Positions are drawn once and for all, so that nothing depends on how
    images are divided over devices.

    Args:
      weights, classes: (b,H,W).

    Returns:
      (b,H,W).
    """
    pixels = weights.shape[1] * weights.shape[2]
    drawn_n = jax.random.permutation(jax.random.key(0), pixels)

    def shuffle(weight_n: Array, class_n: Array) -> Array:
        in_order_n = jnp.argsort(class_n, stable=True)
        at_random_n = drawn_n[jnp.argsort(class_n[drawn_n], stable=True)]
        return jnp.zeros_like(weight_n).at[in_order_n].set(weight_n[at_random_n])

    flat_bn = [array.reshape(-1, pixels) for array in (weights, classes)]
    return jax.vmap(shuffle)(*flat_bn).reshape(weights.shape)


def _at_pixels(
    value_bhwc: Array, label_bhw: Array, field: ReceptiveField | None
) -> tuple[Array, Array]:
    """Looks up every pixel's value for its patch and class, and where it has a class.

    On GPUs every pixel fetches its value. Elsewhere that works class by class, so that
    no (b,H,W,C) map exists in memory: fetching would take a tile of memory per pixel on
    a TPU, 6.2 GB for two images of 801 x 801 and 21 classes on a v5e.
    """
    row = nearest_patch(label_bhw.shape[1], value_bhwc.shape[1], field)
    column = nearest_patch(label_bhw.shape[2], value_bhwc.shape[2], field)
    look_up = _fetch if target_platform() == "gpu" else _choose
    chosen_bhw = look_up(value_bhwc, label_bhw, row, column)
    labeled_bhw = labeled_pixels(label_bhw, value_bhwc.shape[-1])
    # With more than 255 classes the void label is the number of one of them.
    return jnp.where(labeled_bhw, chosen_bhw, 0), labeled_bhw


def _fetch(
    value_bhwc: Array, label_bhw: Array, row: np.ndarray, column: np.ndarray
) -> Array:
    batch, _, width, classes = value_bhwc.shape
    first_b = jnp.arange(batch)[:, None, None] * (value_bhwc.size // batch)
    patch_hw = jnp.asarray(row[:, None] * width + column[None, :])
    index_bhw = first_b + patch_hw[None] * classes + jnp.clip(label_bhw, 0, classes - 1)
    return value_bhwc.reshape(-1)[index_bhw]


def _choose(
    value_bhwc: Array, label_bhw: Array, row: np.ndarray, column: np.ndarray
) -> Array:
    def choose(chosen_bhw: Array, of_class: tuple[Array, Array]):
        number, value_bhw = of_class
        near_bhw = jnp.take(jnp.take(value_bhw, row, axis=1), column, axis=2)
        return jnp.where(label_bhw == number, near_bhw, chosen_bhw), None

    classes = value_bhwc.shape[-1]
    chosen_bhw, _ = jax.lax.scan(
        choose,
        jnp.zeros(label_bhw.shape, value_bhwc.dtype),
        (jnp.arange(classes), jnp.moveaxis(value_bhwc, -1, 0)),
    )
    return chosen_bhw


def _check_known(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}; valid: {', '.join(valid)}")
