"""From prepared records to batches of uint8 crops, by grain.

The order of operations decides what is random and what may be resumed:

    ids -> tile the labelled list -> shuffle -> whole batches only -> repeat
        -> read, decode, crop (random_map) -> slice by process -> batch -> zip

`random_map` comes after `repeat` and before the slice, so an example's draws depend on
the seed and its place in the global order: they differ between epochs and streams and
not between numbers of threads or processes. The iterator's position is the step.

A second crop of the same unlabelled image (UniMatch's partner) is cut from the same
decoded image with draws of its own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from mpmc_jax.data import host, source
from mpmc_jax.data.info import DatasetInfo
from mpmc_jax.data.splits import Split
from mpmc_jax.types import Batch, Crops, Streams

_STREAM_NUMBERS = {"labeled": 0, "unlabeled": 1}


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How training batches are made.

    Attributes:
      batch_size: labelled images a step, over all processes; as many unlabelled ones.
      crop: geometry settings.
      streams: what the method asks for.
      seed: of order and geometry.
      threads: reading threads; 0 reads in the calling one.
      prefetch: batches prepared ahead, if there are threads.
      process_index: this process.
      process_count: how many share the global batch.
    """

    batch_size: int
    crop: host.CropConfig
    streams: Streams
    seed: int = 0
    threads: int = 2
    prefetch: int = 4
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"train.batch_size={self.batch_size} must be a positive multiple of "
                f"the number of processes, {self.process_count}"
            )


@dataclasses.dataclass(frozen=True)
class _ReadCrops(grain.transforms.RandomMap):
    """Position in an id list -> crops of that image, as a dictionary of arrays."""

    records: Sequence[dict]
    positions: np.ndarray
    ids: tuple[str, ...]
    channels: int
    crop: host.CropConfig
    geometry: host.Geometry
    with_label: bool
    copies: int

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        """The crops, a list of `copies`; draws are made in that order."""
        name = self.ids[element]
        record = self.records[int(self.positions[element])]
        try:
            image = source.decode_image(record["image"], self.channels)
            label_hw = source.decode_mask(record["mask"]) if self.with_label else None
        except source.UnreadableImage as error:
            raise ValueError(f"record {name!r}: {error}") from error
        return [self._one(element, image, label_hw, rng) for _ in range(self.copies)]

    def _one(
        self,
        element: int,
        image: Image.Image,
        label_hw: np.ndarray | None,
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        size = (image.height, image.width)
        placement = self.geometry(rng, size, self.crop)
        arrays = {
            "image": host.crop_image(image, placement, self.crop),
            "extent": placement.extent(),
            "index": np.array(element, np.int32),
        }
        if label_hw is not None:
            arrays["label"] = host.crop_label(label_hw, placement, self.crop)
        return arrays


class TrainIterator(Iterator[Batch]):
    """Batches from a given step on; `close` it when done.

    The state of an iterator that has given n batches is {"next_index": n}, whatever
    its threads have prefetched.
    """

    def __init__(self, dataset: grain.IterDataset, record: np.ndarray, start_step: int):
        self._iterator: Any = iter(dataset)
        # NumPy on the host; what places a batch makes it the declared jax.Array.
        self._record: Any = record
        self.set_state({"next_index": start_step})

    def __next__(self) -> Batch:
        streams = next(self._iterator)
        crops = [Crops(record=self._record, **arrays) for arrays in streams]
        return Batch(*crops)

    def get_state(self) -> dict[str, int]:
        """{"next_index": step of the batch that comes next}."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the step that a saved state names."""
        self._iterator.set_state({"next_index": int(state["next_index"])})

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()


class TrainPipeline:
    """The training batches of one run, as a function of data, split and seed.

    An epoch is a pass over the unlabelled list in whole batches. The labelled list is
    tiled to that length and cut, as UniMatch does; one that is longer stays whole, and
    each epoch uses another part of it.

    Attributes:
      split: the ids in use.
      steps_per_epoch: whole batches in the unlabelled list (at least 1).
      num_labeled: distinct labelled images.
      num_unlabeled: unlabelled images; the method may leave them unused.
      repetition: passes over the labelled list an epoch.

    Raises:
      ValueError: the method wants unlabelled images and the split has none.
    """

    def __init__(self, info: DatasetInfo, split: Split, config: PipelineConfig):
        if config.streams.unlabeled and not split.unlabeled:
            raise ValueError(
                "the split leaves no unlabelled image, and the method needs some; "
                "label fewer images (data.split), add images, or use method=supervised"
            )
        self.split = split
        self.num_labeled = len(split.labeled)
        self.num_unlabeled = len(split.unlabeled)
        self._info = info
        self._config = config
        self._records = info.records("train")
        self._epoch = self.num_unlabeled or self.num_labeled
        self.steps_per_epoch = max(self._epoch // config.batch_size, 1)
        per_epoch = self.steps_per_epoch * config.batch_size
        self.repetition = per_epoch / self.num_labeled

    def iterator(self, start_step: int = 0) -> TrainIterator:
        """Endless batches; the first is that of `start_step`.

        Arrays are NumPy and hold this process's share: process p of P has the rows
        p, p+P, ... of the global batch, which `record` names.
        """
        config = self._config
        dataset = self._streams().to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.threads,
                prefetch_buffer_size=config.prefetch if config.threads else 0,
            )
        )
        record = np.arange(
            config.process_index,
            config.batch_size,
            config.process_count,
            dtype=np.int32,
        )
        return TrainIterator(dataset, record, start_step)

    def _streams(self) -> grain.MapDataset:
        config = self._config
        tiles = -(-self._epoch // self.num_labeled)
        tiled = np.tile(np.arange(self.num_labeled), tiles)
        tiled = tiled[: max(self._epoch, self.num_labeled)]
        streams = [self._stream("labeled", tiled.tolist(), copies=1)]
        if config.streams.unlabeled:
            everything = list(range(self.num_unlabeled))
            copies = 2 if config.streams.partner else 1
            streams.append(self._stream("unlabeled", everything, copies))
        zipped = grain.experimental.ZipMapDataset(streams)
        # ((labelled,), (unlabelled, partner)) -> (labelled, unlabelled, partner)
        return zipped.map(lambda parts: sum(map(tuple, parts), ()))

    def _stream(self, name: str, elements: list[int], copies: int) -> grain.MapDataset:
        config = self._config
        ids = getattr(self.split, name)
        place = {key: i for i, key in enumerate(self._info.ids["train"])}
        entropy = np.random.SeedSequence((config.seed, _STREAM_NUMBERS[name]))
        read = _ReadCrops(
            records=self._records,
            positions=np.array([place[key] for key in ids]),
            ids=ids,
            channels=self._info.facts.channels,
            crop=config.crop,
            geometry=host.build_geometry(config.streams.geometry),
            with_label=name == "labeled",
            copies=copies,
        )
        dataset = grain.MapDataset.source(elements).seed(
            int(entropy.generate_state(1)[0])
        )
        dataset = dataset.shuffle()
        whole = self.steps_per_epoch * config.batch_size
        if whole <= len(elements):
            dataset = dataset[:whole]
        dataset = dataset.repeat(None).random_map(read)
        dataset = dataset[config.process_index :: config.process_count]
        return dataset.batch(
            config.batch_size // config.process_count, drop_remainder=True
        )
