"""Weights of the classes from their frequencies in the training labels.

Median-frequency balancing: Eigen and Fergus, ICCV 2015, as SegNet uses it.
"""

from collections.abc import Sequence

import numpy as np

from mpmc_jax.data import decode
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.parallel_map import map_with_progress
from mpmc_jax.data.raster_formats import UnreadableImage


def median_frequency_weights(
    info: DatasetInfo, labeled: Sequence[str]
) -> tuple[float, ...]:
    """Returns the weight of each class in the labels of training images.

        weight_c = median of all frequencies / frequency_c
        frequency_c = pixels of class c / labeled pixels of the images that have c

    A class that no label has gets a weight of 1, which nothing is multiplied by.

    Args:
      info: the data set.
      labeled: ids of the labeled training images.

    Raises:
      ValueError: a mask cannot be read; the message names its record.
    """
    position = {key: i for i, key in enumerate(info.ids["train"])}
    records, classes = info.records("train"), info.facts.num_classes

    def count(key: str) -> np.ndarray:
        try:
            label_hw = decode.record_label(records[position[key]]["mask"])
        except UnreadableImage as error:
            raise ValueError(f"record {key!r}: {error}") from error
        return np.bincount(label_hw.ravel(), minlength=classes)[:classes]

    pixels, around = np.zeros((2, classes), np.int64)
    for counts in map_with_progress(count, list(labeled), "counting classes"):
        pixels += counts
        around += np.where(counts > 0, counts.sum(), 0)
    return balance(pixels, around)


def balance(pixels: np.ndarray, around: np.ndarray) -> tuple[float, ...]:
    """Returns the weights from counts, see `median_frequency_weights`.

    Args:
      pixels: (c,) pixels of each class.
      around: (c,) labeled pixels of the images in which the class occurs.
    """
    seen = pixels > 0
    frequency = pixels[seen] / around[seen]
    weights = np.ones(len(pixels))
    weights[seen] = np.median(frequency) / frequency
    return tuple(weights.tolist())
