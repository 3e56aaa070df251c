"""The check that images fit into device memory, made before compilation."""

from mpmc_jax.text import quantity


def check_size(
    images: int,
    size: tuple[int, int],
    depth: int,
    *,
    free: int,
    devices: int,
) -> None:
    """Raises ValueError if input and scores alone exceed the devices' memory.

    The network's feature maps are not counted, so no batch that fits is refused.

    Args:
      images: number of images in the batch, over all devices.
      size: rows and columns of the images.
      depth: channels of images and scores together, in float32.
      free: bytes that were free on the devices before the first program ran. Later,
        less is reported, because JAX keeps the memory of earlier programs for reuse.
      devices: number of devices that share the batch.

    Raises:
      ValueError: names the bytes needed, and how to reduce them.
    """
    needed = images * size[0] * size[1] * depth * 4
    if needed > free:
        hint = "lower eval.batch_size" if images > devices else "use smaller images"
        raise ValueError(
            f"the scores of {quantity(images, 'image')} of {size[0]} x {size[1]} "
            f"pixels take more than {needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} GB are free; {hint}"
        )
