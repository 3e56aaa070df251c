"""Mixing of images: random boxes, masks, pasting, and partners within a group.

A rectangle is four int32 numbers: top, left, bottom, right, the last two exclusive.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpmc_jax.types import Array, PyTree

_AREA_RANGE = (0.02, 0.4)
_RATIO_RANGE = (0.3, 1 / 0.3)
_CANDIDATES = 512
_XOR_BOXES = 3
_BOX_PROBABILITY = 0.5


def draw_box(key: Array, size: int) -> Array:
    """Draws UniMatch's CutMix box for one square crop (dataset/transform.py).

    There is a box in half of the cases. Its area is uniform in 0.02..0.4 of the
    crop; then aspect ratio (uniform in 0.3..1/0.3) and corner (any pixel of the crop)
    are drawn until the box lies inside. Here, a fixed number of candidates is drawn,
    and the first that fits is taken. Let a be the box's share of the crop's area and r
    its aspect ratio: a candidate fits with a probability of at least the mean over r of
    max(0, 1 - sqrt(a/r)) max(0, 1 - sqrt(a r)). This is smallest for the largest box:
    0.0593 at a = 0.4, for any crop. So all 512 candidates fail in less than one of
    10^13 draws, and then there is no box.

    Args:
      key: the key of one example.
      size: side of the crop in pixels.

    Returns:
      (4,) int32 top, left, bottom, right; zeros if there is no box.
    """
    # One draw for all numbers: XLA compiles every call of the generator separately.
    uniform = jax.random.uniform(key, (2 + 3 * _CANDIDATES,), jnp.float32)
    wanted = uniform[0] < _BOX_PROBABILITY
    area = _between(uniform[1], *_AREA_RANGE) * size**2
    ratio, top, left = uniform[2:].reshape(3, _CANDIDATES)
    ratio = _between(ratio, *_RATIO_RANGE)
    height = jnp.floor(jnp.sqrt(area * ratio))
    width = jnp.floor(jnp.sqrt(area / ratio))
    top, left = jnp.floor(top * size), jnp.floor(left * size)
    boxes = jnp.stack([top, left, top + height, left + width], axis=-1)
    fits = (boxes <= size).all(-1)
    box = jnp.where(wanted & fits.any(), boxes[jnp.argmax(fits)], 0)
    return box.astype(jnp.int32)


def _between(uniform: Array, low: float, high: float) -> Array:
    return low + (high - low) * uniform


def draw_boxes(keys_b: Array, size: int) -> Array:
    """Draws one CutMix box per example: (b,) keys -> (b,4); see `draw_box`."""
    return jax.vmap(lambda key: draw_box(key, size))(keys_b)


def draw_squares(
    group_keys: Array, keys_b: Array, size: int, *, beta: tuple[float, float]
) -> Array:
    """Draws AugSeg's boxes: one size per group, one center per example.

    The side is floor(size sqrt(1 - lambda)) with one lambda ~ Beta(a, b) per group. The
    center's coordinates are uniform in size // 8..size - 1. The box extends half the
    side from the center in each direction and is clipped at the border
    (dataset/augs_ALIA.py).

    Args:
      group_keys: (g,) keys.
      keys_b: (b,) keys of the groups' examples, group after group.
      size: side of the crop in pixels.
      beta: the parameters a and b.

    Returns:
      (b,4) int32.
    """

    def half(key: Array) -> Array:
        area = 1 - jax.random.beta(key, *beta, dtype=jnp.float32)
        return jnp.floor(size * jnp.sqrt(area)).astype(jnp.int32) // 2

    def center(key: Array) -> Array:
        return jax.random.randint(key, (2,), size // 8, size)

    halves = jnp.repeat(jax.vmap(half)(group_keys), len(keys_b) // len(group_keys))
    centers = jax.vmap(center)(keys_b)
    corners = [centers - halves[:, None], centers + halves[:, None]]
    return jnp.clip(jnp.concatenate(corners, axis=-1), 0, size)


def draw_half_boxes(keys_b: Array, size: int) -> Array:
    """Draws U2PL's CutMix boxes of half the crop's area: (b,) keys -> (b,4) int32.

    The width is uniform among the integers above size / 2 and below size. The height is
    size^2 / (2 width), rounded half to even. The corner is uniform among all that fit.
    """

    def draw(key: Array) -> Array:
        width_key, corner_key = jax.random.split(key)
        width = jax.random.randint(width_key, (), size // 2 + 1, size)
        height = jnp.round(size**2 / 2 / width).astype(jnp.int32)
        sides = jnp.stack([height, width])
        corner = jax.random.randint(corner_key, (2,), 0, size - sides + 1)
        return jnp.concatenate([corner, corner + sides])

    return jax.vmap(draw)(keys_b)


def fallback_box(uniform: Array, size: int) -> Array:
    """AEL's box of half the crop's area, used if there is no object: (4,) int32.

    Args:
      uniform: (3,) in [0, 1): u of the sides size * 0.5^u and size * 0.5^(1-u), then
        the relative row and column.
      size: side of the crop in pixels.
    """
    sides = jnp.round(size * 0.5 ** jnp.stack([uniform[0], 1 - uniform[0]]))
    corner = jnp.round((size - sides) * uniform[1:])
    return jnp.concatenate([corner, corner + sides]).astype(jnp.int32)


def draw_xor_masks(keys_b: Array, size: int) -> Array:
    """Draws CPS's masks of three boxes, each of which inverts the mask inside it.

    A box's share q of the crop is uniform in 0.25..0.5; its relative height is q^u with
    u uniform in 0..1, its relative width q over that, and both times sqrt(1/3). The
    corner is uniform among the places where the box fits. Where two boxes overlap they
    cancel (TorchSemiSeg, mask_gen.py).

    Args:
      keys_b: (b,) keys.
      size: side of the crop in pixels.

    Returns:
      (b,size,size) bool.
    """

    def draw(key: Array) -> Array:
        uniform = jax.random.uniform(key, (4, _XOR_BOXES), jnp.float32)
        share = _between(uniform[0], 0.25, 0.5)
        height = share ** uniform[1]
        relative = jnp.stack([height, share / height]) * (1 / _XOR_BOXES) ** 0.5
        sides = jnp.round(relative * size)
        corner = jnp.round((size - sides) * uniform[2:])
        boxes = jnp.concatenate([corner, corner + sides]).T
        inside = box_mask(boxes.astype(jnp.int32), size, size)
        return inside.sum(0) % 2 == 1

    return jax.vmap(draw)(keys_b)


def draw_orders(group_keys: Array, group_size: int) -> Array:
    """Draws a permutation per group: (g,) keys -> (g,group_size) int32."""
    return jax.vmap(lambda key: jax.random.permutation(key, group_size))(group_keys)


def permute_in_groups(tree_b: PyTree, orders: Array) -> PyTree:
    """Replaces example i of each group by the group's example orders[group, i].

    Args:
      tree_b: arrays whose first axis holds whole groups, one after another.
      orders: (g,group_size), see `draw_orders`.
    """
    groups, group_size = orders.shape
    places = (orders + group_size * jnp.arange(groups)[:, None]).reshape(-1)
    return jax.tree.map(lambda x: x[places], tree_b)


def box_mask(boxes_b4: Array, height: int, width: int) -> Array:
    """The pixels inside each rectangle: (b,4) -> (b,height,width) bool."""
    top, left, bottom, right = (boxes_b4[:, i, None, None] for i in range(4))
    row = jnp.arange(height)[None, :, None]
    column = jnp.arange(width)[None, None, :]
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def extent_mask(extents_b4: Array, height: int, width: int) -> Array:
    """The real pixels of crops (`Crops.extent`): (b,4) -> (b,height,width) bool."""
    return box_mask(extents_b4, height, width)


def paste(mask_bhw: Array, inside: Array, outside: Array) -> Array:
    """Takes `inside` where the mask is True and `outside` elsewhere.

    Args:
      mask_bhw: (b,h,w) bool.
      inside: (b,h,w), such as labels, or (b,h,w,c), such as images.
      outside: an array of the same shape.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: the shapes do not agree.
    """
    if inside.shape != outside.shape or inside.shape[:3] != mask_bhw.shape:
        raise ValueError(
            f"cannot paste {inside.shape} into {outside.shape} by a mask of "
            f"{mask_bhw.shape}: both need the same shape, starting with the mask's"
        )
    mask = mask_bhw.reshape(mask_bhw.shape + (1,) * (inside.ndim - 3))
    return jnp.where(mask, inside, outside)


def roll_in_groups(tree_b: PyTree, group_size: int) -> PyTree:
    """Replaces every example by the next one of its group, the last by the first.

    Args:
      tree_b: arrays whose first axis holds whole groups, one after another.
      group_size: examples per group. A single example is its own partner.

    Returns:
      The same structure, with example (i + 1) mod group_size at index i of a group.

    Raises:
      ValueError: the examples do not make whole groups.
    """
    return _reorder(lambda x: jnp.roll(x, -1, axis=1), tree_b, group_size)


def reverse_in_groups(tree_b: PyTree, group_size: int) -> PyTree:
    """Reverses the order of each group's examples; see `roll_in_groups`."""
    return _reorder(lambda x: jnp.flip(x, axis=1), tree_b, group_size)


def _reorder(
    change: Callable[[Array], Array], tree_b: PyTree, group_size: int
) -> PyTree:
    """Applies `change` to (g,group_size,...) of every (b,...) array."""

    def reorder(x: Array) -> Array:
        if x.shape[0] % group_size:
            raise ValueError(
                f"{x.shape[0]} examples on a device do not make whole groups of "
                f"{group_size}; change the batch size or group_size"
            )
        grouped = x.reshape((-1, group_size) + x.shape[1:])
        return change(grouped).reshape(x.shape)

    return jax.tree.map(reorder, tree_b)


def paste_next(mask_bhw: Array, value: Array, group_size: int) -> Array:
    """Pastes the group's next example into each example where the mask is True."""
    return paste(mask_bhw, roll_in_groups(value, group_size), value)
