"""Batches of whole images for evaluation, prefetched in threads."""

import collections
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mpmc_jax.types import IGNORE_LABEL

Canvas = Callable[[tuple[int, int]], tuple[int, int]]
OnCanvas = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Number of batches decoded while the device computes, and of the threads for it.
_AHEAD = 2


class Example(Protocol):
    """An image with its label map."""

    @property
    def id(self) -> str:
        """The name used in error messages."""
        ...

    @property
    def image(self) -> np.ndarray:
        """(h,w,c) as stored."""
        ...

    @property
    def label(self) -> np.ndarray:
        """(h,w) uint8, 255 for void."""
        ...


class Dataset(Protocol):
    """Labeled images with random access; `__getitem__` is called from threads."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Decodes one image."""
        ...

    def size(self, index: int, /) -> tuple[int, int]:
        """Rows and columns of an image."""
        ...

    @property
    def volumes(self) -> Sequence[str]:
        """The volume of which each image is a slice, in order; "" for none."""
        ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """The images that the network sees in one call.

    Attributes:
      size: height and width of the arrays.
      rows: length of the batch axis, the same for all batches of one size; rows beyond
        the number of images are filler.
      indices: indices of the images, at most `rows` of them.
    """

    size: tuple[int, int]
    rows: int
    indices: tuple[int, ...]


def plan(
    dataset: Dataset,
    batch_size: int,
    num_devices: int,
    canvas: Canvas = lambda size: size,
    indices: Iterable[int] | None = None,
) -> list[Batch]:
    """Groups images by the size of their canvas and cuts every group into batches.

    All batches of one size have the same number of rows, so that they share a compiled
    program, and as few rows as possible, to minimize padding. `rows` is a multiple of
    `num_devices`, at most `batch_size` rounded up to such a multiple. `indices` are the
    images to use; None means all.
    """
    groups = collections.defaultdict(list)
    for index in range(len(dataset)) if indices is None else indices:
        groups[canvas(dataset.size(index))].append(index)
    batches = []
    for size, members in sorted(groups.items()):
        number = math.ceil(len(members) / _round_up(batch_size, num_devices))
        rows = _round_up(math.ceil(len(members) / number), num_devices)
        for start in range(0, len(members), rows):
            batches.append(Batch(size, rows, tuple(members[start : start + rows])))
    return batches


def load(
    dataset: Dataset,
    batch: Batch,
    on_canvas: OnCanvas = lambda image, label: (image, label),
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a batch: images (b,h,w,c) as stored, and labels (b,h,w) uint8.

    Padding is mirrored, filler rows are black, and both are labeled 255.

    Args:
      dataset, batch: what to read.
      on_canvas: (image, label) -> the image and label to put onto the canvas.

    Raises:
      ValueError: an image, its label and its size in the data set differ.
    """
    examples = [dataset[index] for index in batch.indices]
    first = examples[0].image
    images = np.zeros((batch.rows, *batch.size, first.shape[-1]), first.dtype)
    labels = np.full((batch.rows, *batch.size), IGNORE_LABEL, np.uint8)
    for row, (index, example) in enumerate(zip(batch.indices, examples, strict=True)):
        size = dataset.size(index)
        if not example.image.shape[:2] == example.label.shape == size:
            raise ValueError(
                f"{example.id}: the image has {example.image.shape[:2]} pixels, its "
                f"label {example.label.shape}, and the data set states "
                f"{size}; prepare the data set again"
            )
        image, label = on_canvas(example.image, example.label)
        height, width = label.shape
        images[row] = mirrored(image, batch.size)
        labels[row, :height, :width] = label
    return images, labels


def mirrored(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Extends an image (h,w,c) at the bottom and right to a size, by mirroring it.

    What a network computes of the image as a whole, as in global pooling, then changes
    less than with black pixels.
    """
    if image.shape[:2] == size:
        return image
    more = [(0, side - own) for side, own in zip(size, image.shape, strict=False)]
    return np.pad(image, (*more, (0, 0)), mode="symmetric")


def load_all(
    dataset: Dataset, batches: Sequence[Batch], on_canvas: OnCanvas
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all batches in order while threads read the next ones."""
    queue: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        for batch in batches:
            queue.append(pool.submit(load, dataset, batch, on_canvas))
            if len(queue) > _AHEAD:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
