"""Pillow's photometric operations, computed on the device for one image.

They work on *levels*, integers 0..255 stored as float32, and round or truncate where
Pillow does. Otherwise, four operations in a row would differ by several levels, and a
hue byte on the other side of a rounding boundary would change a color by six levels.
Compared with Pillow 13, the difference is at most one level, also for the hue of all
2^24 colors. The exception is a blur whose kernel weights have a small common
denominator (sigma exactly 1 or 2): there, sums end in one half, and each of the six
passes may round the other way.

Levels are (h,w,3), or have another number of channels. Then saturation, hue and
grayscale change nothing, as in Pillow's mode L, and contrast uses the mean over all
channels.

Source: Pillow's ImageEnhance, ImageOps, convert("L"), convert("HSV") and GaussianBlur;
Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box
Filtering", 2011.
"""

import jax
import jax.numpy as jnp

from mpmc_jax.types import Array

# ITU-R 601 luma in Pillow's 16-bit fixed point; products with bytes and their sums
# stay below 2^24, hence exact in float32.
_LUMA = tuple(weight / 65536 for weight in (19595, 38470, 7471))

_BLUR_PASSES = 3
# Taps on each side of one box; enough for every sigma below sqrt(6) = 2.449.
_BOX_REACH = 2


def adjust_brightness(levels_hwc: Array, factor: Array) -> Array:
    """Blends the image with black."""
    return _blend(jnp.zeros_like(levels_hwc), levels_hwc, factor)


def adjust_contrast(levels_hwc: Array, factor: Array) -> Array:
    """Blends the image with the mean of its gray version, rounded to a level."""
    gray_hw = _luma(levels_hwc).astype(jnp.int32)
    # Integers, so that the mean does not depend on the order of addition.
    mean = (jnp.sum(gray_hw) + gray_hw.size // 2) // gray_hw.size
    mean_hwc = jnp.broadcast_to(mean.astype(levels_hwc.dtype), levels_hwc.shape)
    return _blend(mean_hwc, levels_hwc, factor)


def adjust_saturation(levels_hwc: Array, factor: Array) -> Array:
    """Blends the image with its gray version."""
    if levels_hwc.shape[-1] != 3:
        return levels_hwc
    return _blend(grayscale(levels_hwc), levels_hwc, factor)


def adjust_hue(levels_hwc: Array, turns: Array) -> Array:
    """Shifts the hue byte of HSV by turns * 255, truncated, modulo 256."""
    if levels_hwc.shape[-1] != 3:
        return levels_hwc
    hue_hw, saturation_hw, value_hw = _hsv(levels_hwc)
    hue_hw = hue_hw + jnp.trunc(turns * 255)
    hue_hw = hue_hw - 256 * jnp.floor(hue_hw / 256)
    return _rgb(hue_hw, saturation_hw, value_hw)


def adjust_sharpness(levels_hwc: Array, factor: Array) -> Array:
    """Blends the image with its 3 x 3 smoothed version, except at the border."""
    height, width, _ = levels_hwc.shape
    neighbors = sum(
        levels_hwc[1 + row : height - 1 + row, 1 + column : width - 1 + column]
        for row in (-1, 0, 1)
        for column in (-1, 0, 1)
    )
    inner = levels_hwc[1:-1, 1:-1]
    # The center weighs 5 of 13; sums of levels are integers, so no quotient is a tie.
    smooth = jnp.floor((neighbors + 4 * inner) / 13 + 0.5)
    return _blend(levels_hwc.at[1:-1, 1:-1].set(smooth), levels_hwc, factor)


def autocontrast(levels_hwc: Array) -> Array:
    """Stretches every channel from its smallest and largest level to 0..255."""
    low, high = (f(levels_hwc, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    spread = high - low
    # Multiplying first keeps integer quotients exact.
    stretched = jnp.floor((levels_hwc - low) * 255 / jnp.maximum(spread, 1))
    return jnp.where(spread > 0, stretched, levels_hwc)


def equalize(levels_hwc: Array) -> Array:
    """Equalizes the histogram of every channel (ImageOps.equalize)."""
    return jax.vmap(_equalize, in_axes=-1, out_axes=-1)(levels_hwc)


def _equalize(levels_hw: Array) -> Array:
    """Equalizes one channel; counts and lookup are matrix products of level nibbles.

    Scatter and gather would take 10.3 GB for two images of 801 x 801 on a TPU v5e
    instead of 0.3 GB. Zeros, ones and levels are exact in any precision, and so are
    sums of ones in float32 below 2^24.
    """
    level = levels_hw.astype(jnp.int32).reshape(-1)
    high, low = (jax.nn.one_hot(part, 16) for part in (level // 16, level % 16))
    counts = (high.T @ low).reshape(-1).astype(jnp.int32)
    largest = jnp.max(level)
    step = (levels_hw.size - counts[largest]) // 255
    below = jnp.cumsum(counts) - counts
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    rows = high @ table.reshape(16, 16).astype(high.dtype)
    mapped = jnp.sum(rows * low, axis=-1).reshape(levels_hw.shape)
    return jnp.where(step > 0, mapped.astype(levels_hw.dtype), levels_hw)


def posterize(levels_hwc: Array, bits: Array) -> Array:
    """Keeps the `bits` leading bits of every level."""
    step = 2 ** (8 - bits)
    return jnp.floor(levels_hwc / step) * step


def solarize(levels_hwc: Array, threshold: Array) -> Array:
    """Inverts the levels that are at least the threshold."""
    return jnp.where(levels_hwc < threshold, levels_hwc, 255 - levels_hwc)


def grayscale(levels_hwc: Array) -> Array:
    """Converts to gray: every channel is the luma."""
    if levels_hwc.shape[-1] != 3:
        return levels_hwc
    return jnp.broadcast_to(_luma(levels_hwc)[..., None], levels_hwc.shape)


def gaussian_blur(levels_hwc: Array, sigma: Array, *, unroll: bool = False) -> Array:
    """Blurs as Pillow does: three extended box filters per axis, edges repeated.

    A box of fractional radius `inner + fraction` has the variance sigma^2 / 3 (Gwosdek
    et al., eq. 6). Every pass rounds to integer levels, which may have any dtype.
    """
    variance = sigma.astype(jnp.float32) ** 2 / _BLUR_PASSES
    inner = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    outer = inner + 1
    fraction = (2 * inner + 1) * (inner * outer - 3 * variance)
    fraction = fraction / (6 * (variance - outer**2))
    distance = jnp.arange(_BOX_REACH + 1)
    taps = jnp.where(distance <= inner, 1, jnp.where(distance == outer, fraction, 0))
    taps = taps / (2 * (inner + fraction) + 1)
    for axis in (1, 0):

        def one_pass(_: int, padded: Array, axis: int = axis) -> Array:
            # XLA would fuse the passes and compute each once for every tap of the next,
            # which is 8 to 30 times slower on CPU. There only the loop prevents that.
            padded = jax.lax.optimization_barrier(padded)
            return _repeat_edges(_box_filter(padded, taps, axis), axis)

        padded_hwc = _repeat_edges(levels_hwc, axis)
        padded_hwc = jax.lax.fori_loop(
            0, _BLUR_PASSES, one_pass, padded_hwc, unroll=unroll
        )
        size = levels_hwc.shape[axis]
        levels_hwc = jax.lax.slice_in_dim(
            padded_hwc, _BOX_REACH, _BOX_REACH + size, axis=axis
        )
    return levels_hwc


def _blend(degenerate: Array, levels: Array, factor: Array) -> Array:
    """Extrapolates from the degenerate image by a factor, clips, then truncates."""
    blended = degenerate + factor * (levels - degenerate)
    return jnp.floor(jnp.clip(blended, 0, 255))


def _luma(levels_hwc: Array) -> Array:
    if levels_hwc.shape[-1] != 3:
        return jnp.floor(jnp.mean(levels_hwc, axis=-1) + 0.5)
    weighted = [levels_hwc[..., i] * weight for i, weight in enumerate(_LUMA)]
    return jnp.floor(sum(weighted) + 0.5)


def _hsv(levels_hwc: Array) -> tuple[Array, Array, Array]:
    """Converts RGB to Pillow's HSV bytes, three (h,w) arrays.

    With t the distance of the middle channel from the largest, relative to the range,
    the hue in sixths of a turn is an integer plus or minus t. This needs one division
    per pixel, and rounds in float32 like Pillow's three.
    """
    red, green, blue = (levels_hwc[..., i] for i in range(3))
    value = levels_hwc.max(-1)
    lowest = levels_hwc.min(-1)
    spread = value - lowest
    middle = red + green + blue - value - lowest
    t = (value - middle) / jnp.maximum(spread, 1)
    from_red = jnp.where(blue == lowest, 1 - t, t - 1)
    from_green = jnp.where(blue == lowest, 1 + t, 3 - t)
    from_blue = jnp.where(red == lowest, 3 + t, 5 - t)
    sixths = jnp.where(
        red == value, from_red, jnp.where(green == value, from_green, from_blue)
    )
    turns = _sixth(sixths)
    turns = jnp.where(turns < 0, turns + 1, turns)
    hue = jnp.where(spread == 0, 0, _byte(turns))
    return hue, _byte(spread / jnp.maximum(value, 1)), value


def _sixth(x: Array) -> Array:
    """Divides by 6 with correct rounding; XLA multiplies by 1 / 6, one ulp off."""
    quotient = x / 6
    # Both differences are exact, so this is the exact remainder.
    return quotient + ((x - 4 * quotient) - 2 * quotient) / 6


def _byte(fraction: Array) -> Array:
    """Computes floor(255 * fraction) of the exact product, without rounding first."""
    byte = jnp.floor(255 * fraction)
    # 256 * fraction and its difference from a nearby number are exact.
    return byte - (256 * fraction - byte < fraction)


def _rgb(hue_hw: Array, saturation_hw: Array, value_hw: Array) -> Array:
    """Converts HSV bytes to RGB levels (h,w,3)."""
    sixths = hue_hw * (6 / 255)
    saturation = saturation_hw / 255

    def channel(corner: int) -> Array:
        # `lack` is 0 on the third of the circle where the channel is largest, and 1 on
        # the opposite third.
        position = sixths + corner
        position = jnp.where(position < 6, position, position - 6)
        lack = jnp.clip(jnp.minimum(position, 4 - position), 0, 1)
        return jnp.floor(value_hw * (1 - saturation * lack) + 0.5)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def _repeat_edges(levels_hwc: Array, axis: int) -> Array:
    padding = [(0, 0)] * levels_hwc.ndim
    padding[axis] = (_BOX_REACH, _BOX_REACH)
    return jnp.pad(levels_hwc, padding, mode="edge")


def _box_filter(padded_hwc: Array, taps: Array, axis: int) -> Array:
    """Filters along an axis with a symmetric kernel, taps[i] at distance i.

    The result has the dtype of the levels, and no padding.
    """
    size = padded_hwc.shape[axis] - 2 * _BOX_REACH

    def at(offset: int) -> Array:
        start = _BOX_REACH + offset
        part = jax.lax.slice_in_dim(padded_hwc, start, start + size, axis=axis)
        return part.astype(taps.dtype)

    sides = [taps[i] * (at(-i) + at(i)) for i in range(1, _BOX_REACH + 1)]
    filtered_hwc = jnp.floor(sum(sides, taps[0] * at(0)) + 0.5)
    return filtered_hwc.astype(padded_hwc.dtype)
