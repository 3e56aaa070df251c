"""Refuses images that no program could be run on, before one is compiled."""

from mpmc_jax.text import quantity


def check_size(
    images: int,
    size: tuple[int, int],
    depth: int,
    *,
    free: int,
    devices: int,
) -> None:
    """Refuses a batch whose input and scores alone exceed the devices' memory.

    The network's own maps come on top: nothing that fits is refused.

    Args:
      images: of the batch, over all devices.
      size: their rows and columns.
      depth: channels of the images and of their scores together, in float32.
      free: bytes that the devices had before the first program ran. Later there seems
        to be less: what programs leave is kept for the next one.
      devices: how many share the batch.

    Raises:
      ValueError: says the bytes, and what lowers them.
    """
    needed = images * size[0] * size[1] * depth * 4
    if needed > free:
        mend = "lower eval.batch_size" if images > devices else "use smaller ones"
        raise ValueError(
            f"the scores of {quantity(images, 'image')} of {size[0]} x {size[1]} "
            f"pixels take more than {needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} GB are free; {mend}"
        )
