"""Refuses images that no program could be run on, before one is compiled."""

from collections.abc import Sequence

import jax

from mpmc_jax import memory
from mpmc_jax.text import quantity


def check_size(
    images: int,
    size: tuple[int, int],
    depth: int,
    devices: Sequence[jax.Device],
) -> None:
    """Refuses a batch whose input and scores alone exceed the devices' memory.

    The network's own maps come on top: nothing that fits is refused.

    Args:
      images: of the batch, over all devices.
      size: their rows and columns.
      depth: channels of the images and of their scores together, in float32.
      devices: that share the batch.

    Raises:
      ValueError: says the bytes, and what lowers them.
    """
    needed, free = images * size[0] * size[1] * depth * 4, memory.of_devices(devices)
    if needed > free:
        mend = "lower eval.batch_size" if images > len(devices) else "use smaller ones"
        raise ValueError(
            f"the scores of {quantity(images, 'image')} of {size[0]} x {size[1]} "
            f"pixels take more than {needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} GB are free; {mend}"
        )
