"""Photometric augmentation on the device: UniMatch's strong view, feature dropout.

Drawing is apart from applying: `draw_strong` turns a key into parameters,
`apply_strong` is a function of image and parameters alone. Both treat one example and
are vmapped, so an example's result never depends on its neighbours.

Source: UniMatch, dataset/semi.py and dataset/transform.py; torchvision's ColorJitter
and RandomGrayscale on PIL images, whose operations are in `photometric.py`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.methods import photometric
from mpmc_jax.types import Array

# Operations of the colour jitter, in the order of `StrongParams.factors`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Probabilities of jitter, greyscale and blur.
_PROBABILITIES = (0.8, 0.2, 0.5)
# Ranges of the four factors and of the blur's sigma.
_LOWEST = (0.5, 0.5, 0.5, -0.25, 0.1)
_HIGHEST = (1.5, 1.5, 1.5, 0.25, 2.0)

_BLENDS = (
    photometric.adjust_brightness,
    photometric.adjust_contrast,
    photometric.adjust_saturation,
)


@struct.dataclass
class StrongParams:
    """What one image undergoes in a strong view.

    Attributes:
      order: (4,) int32, the jitter's operations (BRIGHTNESS ... HUE) in the order in
        which they act.
      factors: (4,) float32, brightness, contrast and saturation factor (1 changes
        nothing) and the hue shift in turns.
      jitter: () bool, whether the colour jitter acts.
      grayscale: () bool, whether colours become grey.
      sigma: () float32, deviation of the blur in pixels, below 2.449; 0 is no blur.
    """

    order: Array
    factors: Array
    jitter: Array
    grayscale: Array
    sigma: Array


def draw_strong(key: Array) -> StrongParams:
    """Draws the parameters of one image's strong view."""
    # One call for all: every call of the generator compiles to a program of its own.
    uniform = jax.random.uniform(key, (12,), jnp.float32)
    coins, amounts, ranks = uniform[:3], uniform[3:8], uniform[8:]
    jitter, gray, blur = coins < jnp.float32(_PROBABILITIES)
    low, high = jnp.float32(_LOWEST), jnp.float32(_HIGHEST)
    amounts = low + (high - low) * amounts
    return StrongParams(
        order=jnp.argsort(ranks).astype(jnp.int32),
        factors=amounts[:4],
        jitter=jitter,
        grayscale=gray,
        sigma=jnp.where(blur, amounts[4], 0),
    )


def apply_strong(image_hwc: Array, params: StrongParams) -> Array:
    """Applies jitter, greyscale and blur to one image.

    Args:
      image_hwc: colours in 0..1, three channels or one. With one channel, saturation,
        hue and greyscale change nothing, as in Pillow's mode L.
      params: of one image.

    Returns:
      The view, (h,w,c), of the image's dtype, its values multiples of 1/255.

    Raises:
      ValueError: the image has neither one nor three channels.
    """
    if image_hwc.ndim != 3 or image_hwc.shape[-1] not in (1, 3):
        raise ValueError(
            f"the strong view takes (h, w, 3) or (h, w, 1) images, got "
            f"{image_hwc.shape}; give images of other channels a view of their own"
        )
    levels = jnp.round(image_hwc.astype(jnp.float32) * 255)
    jittered = color_jitter(levels, params.factors, params.order)
    levels = jnp.where(params.jitter, jittered, levels)
    levels = jnp.where(params.grayscale, photometric.grayscale(levels), levels)
    levels = photometric.gaussian_blur(levels, params.sigma)
    return levels.astype(image_hwc.dtype) / 255


def strong_view(keys_b: Array, images_bhwc: Array) -> Array:
    """One strong view of every image: (b,) keys, (b,h,w,c) in 0..1 -> (b,h,w,c)."""
    return jax.vmap(lambda key, image: apply_strong(image, draw_strong(key)))(
        keys_b, images_bhwc
    )


def color_jitter(levels_hwc: Array, factors: Array, order: Array) -> Array:
    """Brightness, contrast, saturation and hue in the given order.

    Under vmap a switch computes every branch. The three blends are cheap and the hue
    is not, so the hue runs once and the blends before and after it, each acting on one
    side only: a quarter of the time of four switches over all four.
    """
    place = jnp.argmax(order == HUE)
    blends = jnp.where(jnp.arange(3) < place, order[:3], order[1:])
    before = jnp.arange(3) < place

    def blend(levels, step):
        return jax.lax.switch(step[0], _BLENDS, levels, step[1]), None

    # A factor of 1 leaves every level as it is.
    first = jnp.where(before, factors[blends], 1)
    second = jnp.where(before, 1, factors[blends])
    levels_hwc, _ = jax.lax.scan(blend, levels_hwc, (blends, first))
    levels_hwc = photometric.adjust_hue(levels_hwc, factors[HUE])
    return jax.lax.scan(blend, levels_hwc, (blends, second))[0]


def feature_dropout_mask(
    keys_b: Array, channels: int, *, rate: float = 0.5, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Masks that drop whole channels of a feature map and scale the survivors.

    Args:
      keys_b: (b,) keys, one an example.
      channels: channels of the feature map.
      rate: probability that a channel is dropped, in [0, 1).
      dtype: of the mask; the feature map's.

    Returns:
      (b,1,1,channels), 0 or 1 / (1 - rate).

    Raises:
      ValueError: rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: a dropout rate lies in [0, 1)")
    kept = jax.vmap(
        lambda key: jax.random.bernoulli(key, 1.0 - rate, (1, 1, channels))
    )(keys_b)
    return kept.astype(dtype) / (1 - rate)
