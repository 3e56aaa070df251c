"""Labeled images made in memory, as evaluation reads them."""

import dataclasses

import numpy as np

COLORS = np.array(
    [(10, 20, 30), (220, 40, 40), (40, 200, 60), (50, 70, 220), (220, 210, 60)]
)
NUM_CLASSES = len(COLORS)
BLOCK = 6
SIZES = [(24, 30), (30, 24), (24, 30), (18, 18), (24, 30), (30, 24), (24, 30)]


@dataclasses.dataclass
class Example:
    id: str
    image: np.ndarray
    label: np.ndarray
    volume: str = ""


class Dataset(list):
    """A list of examples."""

    def size(self, index):
        return self[index].label.shape

    @property
    def volumes(self):
        return [example.volume for example in self]


def make_example(rng, name, size, block=BLOCK):
    """Blocks of class colors with noise and a tenth of void."""
    cells = [-(-side // block) for side in size]
    label = np.kron(rng.integers(0, NUM_CLASSES, cells), np.ones((block, block), int))
    label = label[: size[0], : size[1]]
    noise = rng.integers(0, 25, (*size, 3))
    image = COLORS[label] + noise
    label = np.where(rng.random(size) < 0.1, 255, label)
    return Example(name, image.astype(np.uint8), label.astype(np.uint8))


def make_dataset(sizes, seed=0, block=BLOCK):
    rng = np.random.default_rng(seed)
    return Dataset(
        make_example(rng, str(number), size, block) for number, size in enumerate(sizes)
    )
