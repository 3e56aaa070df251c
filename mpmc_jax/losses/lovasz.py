"""The Lovász-softmax loss, a surrogate of the Jaccard index (IoU) of every class.

Source: Berman, Rannen Triki and Blaschko, CVPR 2018, as released, with
`classes="present"` and `per_image=True`.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.losses.pixel import labeled_pixels
from mpmc_jax.losses.reduction import GlobalSum, identity, ratio
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import IGNORE_LABEL, Array


def lovasz_softmax(
    logits: Array,
    labels: Array,
    *,
    ignore_label: int = IGNORE_LABEL,
    global_sum: GlobalSum = identity,
) -> Array:
    """The mean over images of the mean over an image's classes of the Lovász loss.

    Every image is ranked on its own, so that nothing depends on how a batch divides
    over devices. Only classes that occur in an image's labels count there; an image
    without a label counts as 0, as in the released code.

    Args:
      logits: (b,h,w,c) class scores; bfloat16 is cast to float32, float64 is kept.
      labels: (b,h,w) integer classes; `ignore_label` and values >= c are void.
      ignore_label: the void label.
      global_sum: sums an array over devices.

    Returns:
      A scalar in 0..1.
    """
    logits = at_least_float32(logits)
    b, h, w, c = logits.shape
    valid_bn = labeled_pixels(labels, c, ignore_label).reshape(b, h * w)
    p_cbn = jnp.moveaxis(jax.nn.softmax(logits, axis=-1), -1, 0).reshape(c, b, h * w)
    classes_c11 = jnp.arange(c)[:, None, None]
    own_cbn = (labels.reshape(1, b, h * w) == classes_c11) & valid_bn[None]
    error_cbn = jnp.where(valid_bn[None], jnp.abs(own_cbn - p_cbn), 0)

    def weights(error_and_own: tuple[Array, Array]) -> Array:
        error_bn, own_bn = error_and_own
        # Void pixels come last, where they change nothing that comes before.
        return _extension_gradient(jnp.where(valid_bn, error_bn, -1), own_bn)

    # The extension is piecewise linear: these weights are its gradient, too. One class
    # at a time, because sorting takes several times the memory of what it sorts.
    constant = jax.lax.stop_gradient((error_cbn, own_cbn))
    weight_cbn = jax.lax.stop_gradient(jax.lax.map(weights, constant))
    loss_cb = jnp.sum(weight_cbn * error_cbn, axis=-1)
    present_cb = own_cbn.any(axis=-1)
    count_b = jnp.sum(present_cb, axis=0, dtype=jnp.int32)
    of_image_b = ratio(jnp.sum(jnp.where(present_cb, loss_cb, 0), axis=0), count_b)
    return ratio(global_sum(jnp.sum(of_image_b)), global_sum(jnp.asarray(b)))


def _extension_gradient(error_bn: Array, own_bn: Array) -> Array:
    """The gradient (b,n) of the Jaccard loss's Lovász extension by the errors.

    With the pixels of an image in order of falling error, J_i the Jaccard loss where
    the first i of them are wrong, this is J_i - J_(i-1) for the i-th pixel. The
    difference is computed without subtracting numbers close to each other.

    Args:
      error_bn: the errors.
      own_bn: bool, whether the pixel has the class.
    """
    place_bn = jnp.broadcast_to(jnp.arange(error_bn.shape[1]), error_bn.shape)
    _, own_bn, place_bn = jax.lax.sort((-error_bn, own_bn, place_bn), num_keys=1)
    size_b1 = jnp.sum(own_bn, axis=1, keepdims=True, dtype=jnp.int32)
    left_bn = size_b1 - jnp.cumsum(own_bn, axis=1, dtype=jnp.int32)
    union_bn = size_b1 + jnp.cumsum(~own_bn, axis=1, dtype=jnp.int32)
    union_bn = jnp.maximum(union_bn, 1).astype(error_bn.dtype)
    # A missed pixel leaves the union and takes 1 of the intersection; a wrong one adds
    # 1 to the union.
    added_bn = left_bn / (union_bn * jnp.maximum(union_bn - 1, 1))
    gradient_bn = jnp.where(own_bn, 1 / union_bn, added_bn)
    # Back to the pixels' places.
    return jax.lax.sort((place_bn, gradient_bn), num_keys=1)[1]
