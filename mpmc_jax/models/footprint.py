"""The least memory and work of training a network, from its description alone.

Nothing is traced or compiled, so sizes that fit no machine are refused at once.
"""

import jax.numpy as jnp

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import feature_maps


def training_bytes(
    config: ModelConfig, images: int, crop: int, *, recomputes: bool
) -> int:
    """Computes a lower bound of the bytes of a forward and backward pass.

    Batch norm's gradient needs the output of each convolution, so all outputs are held
    until the backward pass, and so are the logits, in float32 at the image's size. Each
    parameter also has a gradient and a momentum.

    Args:
      config: the network.
      images: number of images that pass through it at once.
      crop: side of the images in pixels.
      recomputes: whether the compiler may drop outputs of convolutions and recompute
        them, as where `config.remat` is "all"; then only the largest one counts.
    """
    maps = feature_maps(config)
    itemsize = jnp.dtype(config.dtype).itemsize
    sizes = [each.channels * (crop // each.stride) ** 2 * itemsize for each in maps]
    sizes.append(config.num_classes * crop**2 * 4)
    held = max(sizes) if recomputes or config.remat == "all" else sum(sizes)
    return images * held + 3 * 4 * sum(each.weights for each in maps)


def training_flops(config: ModelConfig, images: int, crop: int) -> float:
    """Estimates the FLOPs of a forward and backward pass, from its kernels alone.

    Each weight is multiplied and added once per position in the forward pass, and twice
    in the backward pass.

    Args:
      config: the network.
      images: number of images.
      crop: side of the images in pixels.
    """
    maps = feature_maps(config)
    return 6 * images * sum(m.weights * float(crop / m.stride) ** 2 for m in maps)
