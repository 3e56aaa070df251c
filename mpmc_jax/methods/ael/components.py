"""Connected components of a mask, computed on the device with static shapes.

AEL cuts a whole object out of a prediction: the bounding box of an 8-connected
component, drawn uniformly among those that are large enough.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.augmentation import mixing
from mpmc_jax.types import Array


def label_components(mask_hw: Array) -> Array:
    """Numbers the 8-connected components of a mask.

    Every pixel has a parent in its component, at first itself. Each round has two
    steps. Hooking: a parent takes the largest grandparent among the neighbors.
    Shortcutting: each pixel points to its grandparent. After about ten rounds, every
    pixel points to the last pixel of its component.

    Source: Zhang, Azad and Hu, "FastSV", SIAM PP 2020.

    Returns:
      (h,w) int32: 0 outside the mask, else 1 + the position (in row-major order) of the
      component's last pixel.
    """
    position_hw = jnp.arange(1, mask_hw.size + 1, dtype=jnp.int32).reshape(
        mask_hw.shape
    )
    # Number 0 stands for everything outside the mask.
    start_n = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.where(mask_hw, position_hw, 0).reshape(-1)]
    )

    def one_round(state: tuple[Array, Any]) -> tuple[Array, Array]:
        after_n = fastsv_round(state[0], mask_hw)
        return after_n, jnp.any(after_n != state[0])

    state = (start_n, jnp.ones((), bool))
    number_n, _ = jax.lax.while_loop(lambda state: state[1], one_round, state)
    return number_n[1:].reshape(mask_hw.shape)


def fastsv_round(number_n: Array, mask_hw: Array) -> Array:
    """A round of `label_components` on the parents of 0 and all pixels: (1 + h*w,)."""
    grand_n = number_n[number_n]
    widest_hw = jax.lax.reduce_window(
        grand_n[1:].reshape(mask_hw.shape),
        np.int32(0),
        jax.lax.max,
        (3, 3),
        (1, 1),
        "SAME",
    )
    inside_n = jnp.where(mask_hw, widest_hw, 0).reshape(-1)
    widest_n = jnp.concatenate([jnp.zeros(1, jnp.int32), inside_n])
    hooked_n = number_n.at[number_n].max(widest_n)
    hooked_n = jnp.maximum(hooked_n, widest_n)
    return hooked_n[hooked_n]


def draw_component_box(
    mask_hw: Array, uniform_hw: Array, min_area: float
) -> tuple[Array, Array]:
    """Draws a component of more than `min_area` pixels uniformly; finds its box.

    Args:
      mask_hw: bool.
      uniform_hw: numbers in [0, 1); the component with the largest one is drawn.
      min_area: pixels that a component must exceed.

    Returns:
      Whether there is such a component, and its (4,) int32 top, left, bottom, right,
      or zeros if there is none.
    """
    height, width = mask_hw.shape
    number_n = label_components(mask_hw).reshape(-1)
    segments = mask_hw.size + 1
    row_n = jnp.repeat(jnp.arange(height, dtype=jnp.int32), width)
    column_n = jnp.tile(jnp.arange(width, dtype=jnp.int32), height)

    area = jnp.bincount(number_n, length=segments)
    # Number 0 is the outside of the mask.
    large = (area > min_area) & (jnp.arange(segments) > 0)
    score = jnp.concatenate([jnp.zeros(1, uniform_hw.dtype), uniform_hw.reshape(-1)])
    chosen = jnp.argmax(jnp.where(large, score, -1))
    inside_n = number_n == chosen
    box = jnp.stack(
        [
            jnp.min(jnp.where(inside_n, row_n, height)),
            jnp.min(jnp.where(inside_n, column_n, width)),
            jnp.max(jnp.where(inside_n, row_n, -1)) + 1,
            jnp.max(jnp.where(inside_n, column_n, -1)) + 1,
        ]
    )
    found = jnp.any(large)
    return found, jnp.where(found, box, 0)


def draw_object_boxes(
    label_ghw: Array, wanted_g: Array, draws: tuple[Array, Array], area: float
) -> tuple[Array, Array]:
    """Draws the box of an object of the wanted class in each prediction.

    Args:
      label_ghw: predicted classes of square crops.
      wanted_g: the class wanted in each prediction.
      draws: numbers in [0, 1): (g,h,w) to choose an object, and (g,3) to draw a box of
        half the crop's area if there is none (`mixing.fallback_box`).
      area: fraction of the crop's area that an object must exceed.

    Returns:
      (g,) bool, whether there is an object; (g,h,w) bool, its mask.
    """

    def one(label_hw: Array, wanted: Array, object_draw: Array, box_draw: Array):
        found, box = draw_component_box(
            label_hw == wanted, object_draw, area * label_hw.size
        )
        return found, jnp.where(
            found, box, mixing.fallback_box(box_draw, len(label_hw))
        )

    found_g, box_g4 = jax.vmap(one)(label_ghw, wanted_g, *draws)
    return found_g, mixing.box_mask(box_g4, *label_ghw.shape[1:])
