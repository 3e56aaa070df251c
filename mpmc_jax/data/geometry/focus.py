"""Crops that are centered on a pixel of chosen classes, for small foregrounds.

nnU-Net (Isensee et al., Nature Methods 2021) oversamples foreground in this way.
"""

import numpy as np

from mpmc_jax.data.geometry.cropping import ClassFocus, Cut, Placement


def focused(
    rng: np.random.Generator, cut: Cut, label_hw: np.ndarray, focus: ClassFocus
) -> Cut:
    """Moves a drawn crop to a pixel of one of the classes, or leaves it.

    Random numbers are drawn in this order: whether to move the crop, the class among
    those that the image has, the pixel. An image without the classes leaves it.

    Args:
      rng: the example's generator.
      cut: the crop as drawn.
      label_hw: the image's label.
      focus: how often, and which classes.
    """
    if rng.random() >= focus.probability:
        return cut
    assert isinstance(cut, Placement)  # `build_train` refuses the others.
    counts = np.bincount(label_hw.ravel(), minlength=256)
    present = [label for label in focus.classes if counts[label]]
    if not present:
        return cut
    label = present[int(rng.integers(len(present)))]
    chosen = int(rng.integers(counts[label]))
    at = int(np.flatnonzero(label_hw == label)[chosen])
    return cut.centered(divmod(at, label_hw.shape[1]), label_hw.shape)
