"""From bytes to what a network eats."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Of ImageNet, in RGB and for images in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_unit(images_bhwc: Array, dtype=jnp.float32) -> Array:
    """uint8 images -> the same in [0, 1]."""
    return images_bhwc.astype(dtype) / 255


def normalize(images_bhwc: Array) -> Array:
    """Images in [0, 1] -> ImageNet-normalised ones; other than 3 channels stay."""
    if images_bhwc.shape[-1] != len(IMAGENET_MEAN):
        return images_bhwc
    mean, std = (
        jnp.asarray(np.reshape(values, (1, 1, 1, -1)), images_bhwc.dtype)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images_bhwc - mean) / std
