"""Patches: the receptive fields of a tap, their classes, and each pixel's patch.

Patch i of a tap covers `field.size` pixels from i * stride - padding on, in rows and
in columns, so its center lies at i * stride - padding + (size - 1) / 2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.losses.pixel import labeled_pixels
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.types import Array

_WORD = 32  # classes in one uint32


def tap_size(image_size: tuple[int, int], field: ReceptiveField) -> tuple[int, int]:
    """Computes rows and columns of a tap if all layers round down: 801 -> 201."""
    rows, columns = (
        int((side + 2 * field.padding - field.size) // field.stride + 1)
        for side in image_size
    )
    return rows, columns


def patch_targets(
    labels: Array,
    num_classes: int,
    field: ReceptiveField,
    *,
    size: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """Finds which classes occur in every patch (the y of eq. 3).

    Classes are packed as bits of uint32 words, so that a windowed bitwise "or" per axis
    replaces a max-pooling of C maps: about 1000 times faster, and exact.

    Args:
      labels: (b,H,W) integer labels. Anything outside 0..num_classes-1, void and
        padding included, sets no class (row D7 of docs/deviations.md).
      num_classes: C.
      field: size, stride and padding of the tap's receptive field in pixels.
      size: rows and columns of the tap; None for `tap_size` (a network that pools
        in ceil mode has one more at some sizes).

    Returns:
      (b,h,w,C) bool targets, and (b,h,w) bool: patches with any labeled pixel.
    """
    label_bhw = labels.astype(jnp.int32)
    known_bhw = labeled_pixels(label_bhw, num_classes)
    bit_bhw = jnp.left_shift(jnp.uint32(1), (label_bhw % _WORD).astype(jnp.uint32))
    targets = []
    for first in range(0, num_classes, _WORD):
        in_word_bhw = known_bhw & (label_bhw // _WORD == first // _WORD)
        word_bhw = jnp.where(in_word_bhw, bit_bhw, jnp.uint32(0))
        seen_bhw = _any_in_window(word_bhw, field, size)
        classes = np.arange(min(_WORD, num_classes - first), dtype=np.uint32)
        shifted_bhwc = jnp.right_shift(seen_bhw[..., None], classes[None, None, None])
        targets.append((shifted_bhwc & 1).astype(jnp.bool_))
    target_bhwc = jnp.concatenate(targets, axis=-1)
    return target_bhwc, target_bhwc.any(axis=-1)


def real_patches(
    real_bhw: Array, field: ReceptiveField, *, size: tuple[int, int] | None = None
) -> Array:
    """Finds patches with at least one real pixel: (b,H,W) bool -> (b,h,w) bool."""
    word_bhw = real_bhw.astype(jnp.uint32)
    return _any_in_window(word_bhw, field, size).astype(jnp.bool_)


def _any_in_window(
    word_bhw: Array, field: ReceptiveField, size: tuple[int, int] | None
) -> Array:
    """Computes the bitwise "or" over every patch, rows first.

    Rows first because their stride reduces the work of the columns. The window doubles:
    the "or" over n pixels, combined with itself shifted by n, is the "or" over 2n. A
    reduce_window with this function crashes libtpu's compiler for eight images on a TPU
    v6e ("Reduction Function not modeled").
    """
    if size is None:
        _, height, width = word_bhw.shape
        size = tap_size((height, width), field)
    for axis, count in zip((1, 2), size, strict=True):
        starts = field.starts(count)
        reach = starts[-1] + field.size
        # Negative where a stride leaves the last pixels unseen.
        after = reach - field.padding - word_bhw.shape[axis]
        padding = [(0, 0, 0)] * 3
        padding[axis] = (field.padding, after, 0)
        word_bhw = jax.lax.pad(word_bhw, np.uint32(0), padding)
        held = 1
        while held < field.size:
            step = min(held, field.size - held)
            near = jax.lax.slice_in_dim(word_bhw, 0, -step, axis=axis)
            word_bhw = near | jax.lax.slice_in_dim(word_bhw, step, None, axis=axis)
            held += step
        if isinstance(field.stride, int):
            word_bhw = jax.lax.slice_in_dim(
                word_bhw, 0, None, stride=field.stride, axis=axis
            )
        else:
            word_bhw = jnp.take(word_bhw, np.array(starts), axis=axis)
    return word_bhw


def nearest_patch(
    side: int, count: int, field: ReceptiveField | None = None
) -> np.ndarray:
    """Finds the patch with the nearest center to each pixel of an axis (D5), (side,).

    Ties go to the lower index. Without a field the stride is side / count rounded up
    and the first center lies on pixel 0: exact at any size for the layers of a ResNet
    (layer1: size 39, stride 4, padding 19), whose fields are centered on the grid.
    """
    stride, first = float(-(-side // count)), 0.0
    if field is not None:
        stride, first = float(field.stride), (field.size - 1) / 2 - field.padding
    center = first + stride * np.arange(count)
    distance = np.abs(np.arange(side)[:, None] - center[None, :])
    return distance.argmin(axis=1).astype(np.int32)
