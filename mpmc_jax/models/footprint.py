"""The least memory that training a network takes, from its description alone.

Nothing is traced or compiled, so that sizes which no machine holds are refused at once.
"""

import jax.numpy as jnp

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import feature_maps


def training_bytes(
    config: ModelConfig, images: int, crop: int, *, recomputes: bool
) -> int:
    """Bytes that a forward and backward pass cannot do without; a lower bound.

    Batch norm's gradient needs what each convolution gave, so all of it is held until
    the backward pass, and so are the logits, in float32 at the image's size. Parameters
    have a gradient and a momentum beside them.

    Args:
      config: the network.
      images: that pass through it at once.
      crop: their sides in pixels.
      recomputes: whether the compiler may drop what convolutions gave and compute it
        again, as `config.remat` has it; then only the largest one counts.
    """
    maps = feature_maps(config)
    itemsize = jnp.dtype(config.dtype).itemsize
    sizes = [each.channels * (crop // each.stride) ** 2 * itemsize for each in maps]
    sizes.append(config.num_classes * crop**2 * 4)
    held = max(sizes) if recomputes or config.remat else sum(sizes)
    return images * held + 3 * 4 * sum(each.weights for each in maps)
