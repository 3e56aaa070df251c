"""Converts stored pixels to the input of a network."""

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.pixels import PixelFormat

Array = jax.Array


def to_unit(images_bhwc: Array, pixels: PixelFormat, dtype=jnp.float32) -> Array:
    """Scales stored images to unit values, (b,h,w,c)."""
    values = images_bhwc.astype(dtype)
    if images_bhwc.dtype == jnp.uint8:
        return values / 255
    low, high = _per_channel(pixels.low, dtype), _per_channel(pixels.high, dtype)
    return (values - low) / (high - low)


def normalize(images_bhwc: Array, pixels: PixelFormat) -> Array:
    """Normalizes unit values to a network's input, (b,h,w,c)."""
    if not any(pixels.mean) and set(pixels.std) == {1.0}:
        return images_bhwc
    dtype = images_bhwc.dtype
    mean, std = _per_channel(pixels.mean, dtype), _per_channel(pixels.std, dtype)
    return (images_bhwc - mean) / std


def _per_channel(values: tuple[float, ...], dtype) -> Array:
    return jnp.asarray(np.reshape(values, (1, 1, 1, -1)), dtype)
