"""Photometric augmentation on the device: UniMatch's and AugSeg's strong views.

Drawing is separate from applying: `draw_strong` turns a key into parameters, and
`apply_strong` depends only on image and parameters. Both process one example, so that
the result never depends on the rest of the batch. The operations are those of
`photometric.py`.

Source: UniMatch, dataset/semi.py and dataset/transform.py; torchvision's ColorJitter
and RandomGrayscale on PIL images. AugSeg, dataset/augs_TIBA.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import photometric
from mpmc_jax.types import Array

# Operations of the color jitter, in the order of `StrongParams.factors`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Probabilities of color jitter, grayscale and blur.
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
    """The parameters of one image's strong view.

    Attributes:
      order: (4,) int32, the jitter's operations (BRIGHTNESS ... HUE) in the order in
        which they are applied.
      factors: (4,) float32, the factors of brightness, contrast and saturation (1
        changes nothing), and the hue shift in turns.
      jitter: () bool, whether the color jitter is applied.
      grayscale: () bool, whether the image is converted to gray.
      sigma: () float32, standard deviation of the blur in pixels, below 2.449; 0 for no
        blur.
    """

    order: Array
    factors: Array
    jitter: Array
    grayscale: Array
    sigma: Array


def draw_strong(key: Array) -> StrongParams:
    """Draws the parameters of one image's strong view."""
    # One draw for all numbers: XLA compiles every call of the generator separately.
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


def apply_strong(
    image_hwc: Array, params: StrongParams, *, unroll: bool = False
) -> Array:
    """Applies jitter, grayscale and blur to one image.

    Args:
      image_hwc: values in 0..1. Unless there are three channels, saturation, hue and
        grayscale change nothing; the other operations treat all channels the same.
      params: the parameters of the view.
      unroll: whether loops over operations are unrolled; see `strong_view`.

    Returns:
      The view, (h,w,c), with the image's dtype and multiples of 1/255 as values.
    """
    levels = _stored(jnp.round(image_hwc.astype(jnp.float32) * 255))
    jittered = color_jitter(levels, params.factors, params.order, unroll=unroll)
    levels = _computed(jnp.where(params.jitter, jittered, levels))
    levels = jnp.where(params.grayscale, photometric.grayscale(levels), levels)
    levels = photometric.gaussian_blur(_stored(levels), params.sigma, unroll=unroll)
    return levels.astype(image_hwc.dtype) / 255


def strong_view(keys_b: Array, images_bhwc: Array) -> Array:
    """Draws and applies a strong view per image: (b,h,w,c) in 0..1 -> (b,h,w,c).

    On accelerators loops are unrolled, since a loop copies what it passes on. On CPUs
    XLA would join unrolled operations, and compute some of them many times.
    """

    def apply(unroll: bool) -> Callable[[Array, StrongParams], Array]:
        return jax.vmap(functools.partial(apply_strong, unroll=unroll))

    return jax.lax.platform_dependent(
        images_bhwc,
        jax.vmap(draw_strong)(keys_b),
        cpu=apply(unroll=False),
        default=apply(unroll=True),
    )


def _stored(levels: Array) -> Array:
    """Converts levels to what they are between two operations.

    They are integers, of which only these bytes are written and read again. Levels
    outside of 0..255, of pixels beyond a data set's usual range, fit as well.
    """
    return levels.astype(jnp.int16)


def _computed(levels: Array) -> Array:
    """Converts stored levels to what the operations of `photometric` take."""
    return levels.astype(jnp.float32)


def color_jitter(
    levels_hwc: Array, factors: Array, order: Array, *, unroll: bool = False
) -> Array:
    """Adjusts brightness, contrast, saturation and hue of levels, in the given order.

    Under vmap, a switch computes every branch. The three blends are cheap, but the hue
    is not. So the hue runs once, and the blends run both before and after it, with the
    factor 1 on one of the sides: a quarter of the time of four switches over all four.
    """
    place = jnp.argmax(order == HUE)
    blends = jnp.where(jnp.arange(3) < place, order[:3], order[1:])
    before = jnp.arange(3) < place

    def blend(levels, step):
        blended = jax.lax.switch(step[0], _BLENDS, _computed(levels), step[1])
        return _stored(blended), None

    # A factor of 1 changes no level.
    first = jnp.where(before, factors[blends], 1)
    second = jnp.where(before, 1, factors[blends])
    levels_hwc, _ = jax.lax.scan(blend, levels_hwc, (blends, first), unroll=unroll)
    shifted_hwc = photometric.adjust_hue(_computed(levels_hwc), factors[HUE])
    steps = (blends, second)
    return jax.lax.scan(blend, _stored(shifted_hwc), steps, unroll=unroll)[0]


# AugSeg's operations, functions of levels and strength; see `draw_intensity`.
INTENSITY = {
    "identity": lambda levels, _: levels,
    "autocontrast": lambda levels, _: photometric.autocontrast(levels),
    "equalize": lambda levels, _: photometric.equalize(levels),
    "blur": photometric.gaussian_blur,
    "contrast": photometric.adjust_contrast,
    "brightness": photometric.adjust_brightness,
    "saturation": photometric.adjust_saturation,
    "sharpness": photometric.adjust_sharpness,
    "posterize": photometric.posterize,
    "solarize": photometric.solarize,
    "hue": photometric.adjust_hue,
}
# (start, range) of the strength: standard deviation of the blur, factors below 0.95,
# bits (4..7) and thresholds (1..255) before rounding down, and hue shifts in turns.
_STRENGTHS = {
    "blur": (0.1, 1.9),
    **dict.fromkeys(
        ("contrast", "brightness", "saturation", "sharpness"), (0.95, -0.9)
    ),
    "posterize": (4, 4),
    "solarize": (1, 255),
    "hue": (-0.5, 1),
}
_WHOLE = ("posterize", "solarize")
# These change nothing in an image that does not have three channels.
_COLOR_ONLY = ("saturation", "hue")
_MAX_OPERATIONS = 3


@struct.dataclass
class IntensityParams:
    """The parameters of one image's strong view in AugSeg.

    Attributes:
      operation: (3,) int32, indices into `INTENSITY`, in the order of application.
      strength: (3,) float32, the strengths of these operations.
    """

    operation: Array
    strength: Array


def draw_intensity(key: Array, channels: int = 3) -> IntensityParams:
    """Draws one image's operations: 1 to 3 of the eleven, with replacement.

    Operations on colors are left out for an image that does not have three channels.
    """
    pool = [
        index
        for index, name in enumerate(INTENSITY)
        if channels == 3 or name not in _COLOR_ONLY
    ]
    uniform = jax.random.uniform(key, (1 + 2 * _MAX_OPERATIONS,), jnp.float32)
    count = 1 + jnp.floor(uniform[0] * _MAX_OPERATIONS)
    drawn = jnp.floor(uniform[1 : 1 + _MAX_OPERATIONS] * len(pool))
    # The rest are the identity, which is the first operation of the pool.
    acts = jnp.arange(_MAX_OPERATIONS) < count
    operation = jnp.asarray(pool)[jnp.where(acts, drawn, 0).astype(jnp.int32)]
    least, extent = jnp.float32([_STRENGTHS.get(name, (0, 0)) for name in INTENSITY]).T
    whole = jnp.asarray([name in _WHOLE for name in INTENSITY])
    strength = least[operation] + extent[operation] * uniform[1 + _MAX_OPERATIONS :]
    strength = jnp.where(whole[operation], jnp.floor(strength), strength)
    return IntensityParams(operation, strength)


def apply_intensity(image_hwc: Array, params: IntensityParams) -> Array:
    """Applies AugSeg's operations to one image; see `apply_strong`."""
    branches = tuple(INTENSITY.values())

    def act(levels, step):
        acted = jax.lax.switch(step[0], branches, _computed(levels), step[1])
        return _stored(acted), None

    levels = _stored(jnp.round(image_hwc.astype(jnp.float32) * 255))
    levels, _ = jax.lax.scan(act, levels, (params.operation, params.strength))
    return levels.astype(image_hwc.dtype) / 255


def intensity_view(keys_b: Array, images_bhwc: Array) -> Array:
    """Draws and applies AugSeg's view per image: (b,h,w,c) in 0..1 -> (b,h,w,c).

    Images are processed sequentially: under vmap, a switch computes all branches.
    """
    return jax.lax.map(
        lambda pair: apply_intensity(
            pair[1], draw_intensity(pair[0], pair[1].shape[-1])
        ),
        (keys_b, images_bhwc),
    )
