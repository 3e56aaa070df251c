"""Batches of whole images for evaluation, read ahead in threads."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mpmc_jax.types import IGNORE_LABEL

# Batches that are decoded while the device computes, and the threads that do it.
_AHEAD = 2


class Example(Protocol):
    """An image with its label map."""

    @property
    def id(self) -> str:
        """The name used in error messages."""
        ...

    @property
    def image(self) -> np.ndarray:
        """(h,w,c) uint8."""
        ...

    @property
    def label(self) -> np.ndarray:
        """(h,w) uint8, 255 for void."""
        ...


class Source(Protocol):
    """A labelled set with random access; `__getitem__` is called from threads."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Decodes one image."""
        ...

    def size(self, index: int, /) -> tuple[int, int]:
        """Rows and columns of an image."""
        ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Which images share a call.

    Attributes:
      size: rows and columns of the arrays.
      rows: images a call has room for; all batches of one size agree in it.
      indices: the images, at most `rows`.
    """

    size: tuple[int, int]
    rows: int
    indices: tuple[int, ...]


def padded_size(size: tuple[int, int], pad_to: int) -> tuple[int, int]:
    """The next multiples of `pad_to`, or the size itself where that is 0."""
    if pad_to == 0:
        return size
    return _round_up(size[0], pad_to), _round_up(size[1], pad_to)


def plan(source: Source, batch_size: int, num_devices: int, pad_to: int) -> list[Batch]:
    """Groups the images by padded size and cuts every group into batches.

    `rows` is a multiple of the devices: `batch_size` rounded up, or less where a
    size occurs less often.
    """
    groups = collections.defaultdict(list)
    for index in range(len(source)):
        groups[padded_size(source.size(index), pad_to)].append(index)
    batches = []
    for size, indices in sorted(groups.items()):
        rows = _round_up(min(batch_size, len(indices)), num_devices)
        for start in range(0, len(indices), rows):
            batches.append(Batch(size, rows, tuple(indices[start : start + rows])))
    return batches


def load(source: Source, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Reads a batch: images (b,h,w,c) uint8 and labels (b,h,w) uint8.

    Padding and the rows that only fill the batch up are black and labelled 255.

    Raises:
      ValueError: an image, its label and its announced size differ.
    """
    examples = [source[index] for index in batch.indices]
    channels = examples[0].image.shape[-1]
    images = np.zeros((batch.rows, *batch.size, channels), np.uint8)
    labels = np.full((batch.rows, *batch.size), IGNORE_LABEL, np.uint8)
    for row, (index, example) in enumerate(zip(batch.indices, examples, strict=True)):
        height, width = source.size(index)
        if not example.image.shape[:2] == example.label.shape == (height, width):
            raise ValueError(
                f"{example.id}: the image has {example.image.shape[:2]} pixels, its "
                f"label {example.label.shape}, and the data set states "
                f"{(height, width)}; prepare the data set again"
            )
        images[row, :height, :width] = example.image
        labels[row, :height, :width] = example.label
    return images, labels


def load_all(
    source: Source, batches: Sequence[Batch]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields every batch in order while threads read the next ones."""
    queue: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        for batch in batches:
            queue.append(pool.submit(load, source, batch))
            if len(queue) > _AHEAD:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
