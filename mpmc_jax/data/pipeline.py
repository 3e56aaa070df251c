"""From prepared records to batches of uint8 crops, by grain.

The order of operations decides what is random and what may be resumed:

    ids -> order (see `orders`) -> read, decode, crop (random_map)
        -> slice by process -> batch -> zip

`random_map` comes after repetition and before the slice, so an example's draws depend
on the seed and its place in the global order: they differ between epochs and streams
and not between numbers of threads or processes. The iterator's position is the step.

Crops that a method wants beside an example (`Streams`) are made with it: a second one
of the same decoded image, or a labeled one to copy objects from.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.device_cache import Resident
from mpmc_jax.data.geometry import registry as host
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.data.partner_loader import Requests
from mpmc_jax.data.reader import CropReader, Reader, ReadLabeled, ReadUnlabeled
from mpmc_jax.data.sampling import Order
from mpmc_jax.data.splits import Split
from mpmc_jax.types import Batch, Crops, Streams


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How training batches are made.

    Attributes:
      batch_size: labeled images a step, over all processes.
      group_size: of them that mix and rank among themselves.
      crop: geometry settings.
      streams: what the method asks for.
      epoch_of: the list that an epoch passes over, "unlabeled" or "labeled".
      seed: of order and geometry.
      threads: reading threads, and as many for requested images; 0 reads in the
        calling one, requested images in one.
      prefetch: batches prepared ahead, if there are threads.
      resident: whether images live on the device, and batches carry plans of crops.
      process_index: this process.
      process_count: how many share the global batch.
    """

    batch_size: int
    group_size: int
    crop: CropConfig
    streams: Streams
    epoch_of: str = "unlabeled"
    seed: int = 0
    threads: int = 2
    prefetch: int = 4
    resident: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"train.batch_size={self.batch_size} must be a positive multiple of "
                f"the number of processes, {self.process_count}"
            )
        if self.epoch_of not in ("labeled", "unlabeled"):
            raise ValueError(
                f"train.epoch_of={self.epoch_of!r} is unknown; "
                "valid: labeled, unlabeled"
            )
        if self.epoch_of == "labeled" and self.streams.unlabeled:
            raise ValueError(
                "train.epoch_of='labeled' is for method=supervised: the other methods' "
                "epochs pass over the unlabeled list; set train.epoch_of=unlabeled"
            )


class TrainIterator(Iterator[Batch]):
    """Batches from a given step on; `close` it when done.

    The state of an iterator that has given n batches is {"next_index": n}, whatever
    its threads have prefetched.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        rows: dict[str, np.ndarray],
        requests: Requests | None,
        start_step: int,
    ):
        self._iterator: Any = iter(dataset)
        self._rows: Any = rows
        self._requests = requests
        self.set_state({"next_index": start_step})

    def __next__(self) -> Batch:
        step = self.get_state()["next_index"]
        crops = {k: v for part in next(self._iterator) for k, v in part.items()}
        if self._requests is not None:
            crops["partner"] = self._requests.take(step)
        # NumPy on the host; what places a batch makes it the declared jax.Array.
        return Batch(**{k: Crops(record=self._rows[k], **v) for k, v in crops.items()})

    def request(self, step: int, images: np.ndarray) -> None:
        """Asks for the partners of `step`: a place in the unlabeled list a group."""
        if self._requests is not None:
            self._requests.ask(step, images)

    def get_state(self) -> dict[str, int]:
        """{"next_index": step of the batch that comes next}."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the step that a saved state names."""
        self._iterator.set_state({"next_index": int(state["next_index"])})

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()
        if self._requests is not None:
            self._requests.close()


class TrainPipeline:
    """The training batches of one run, as a function of data, split and seed.

    How the labeled list fills an epoch is the method's to say, see `orders`.

    Attributes:
      split: the ids in use.
      steps_per_epoch: see `orders`.
      num_labeled: distinct labeled images.
      num_unlabeled: unlabeled images; the method may leave them unused.
      repetition: passes over the labeled list an epoch.
      unused: labeled images that no epoch uses, see `orders`.
      resident: what makes crops of the batches' plans, if images live on the device.
      warnings: what was found wrong with the data set when it was prepared.

    Raises:
      ValueError: the method wants unlabeled images and the split has none; see also
        `Resident`.
    """

    def __init__(self, info: DatasetInfo, split: Split, config: PipelineConfig):
        if config.streams.unlabeled and not split.unlabeled:
            raise ValueError(
                "the split leaves no unlabeled image, and the method needs some; "
                "label fewer images (data.split), add images, or use method=supervised"
            )
        self.split = split
        self.num_labeled = len(split.labeled)
        self.num_unlabeled = len(split.unlabeled)
        self._info = info
        self._config = config
        self._records = info.records("train")
        self._sizes = config.streams.sizes(config.batch_size, config.group_size)
        order = self._order("labeled")
        self.warnings = info.warnings
        self.steps_per_epoch, self.unused = order.steps_per_epoch, order.unused
        per_epoch = self.steps_per_epoch * config.batch_size
        self.repetition = per_epoch / self.num_labeled
        self.resident: Resident | None = None
        if config.resident:
            self.resident = Resident(info, split, config.streams.geometry, config.crop)

    def iterator(self, start_step: int = 0, *, requests: bool = True) -> TrainIterator:
        """Endless batches; the first is that of `start_step`.

        Without `requests` they have no partners that a step would have to ask for.

        Arrays are NumPy and hold this process's share: process p of P has the rows
        p, p+P, ... of the global batch, which `record` names.
        """
        config = self._config
        streams = [self._labeled()]
        if config.streams.unlabeled:
            streams.append(self._unlabeled())
        if config.streams.partner == "other":
            read = ReadUnlabeled(self._reader("unlabeled"), config.crop, ("partner",))
            streams.append(self._read("partner", read))
        # All are endless, but by their batch sizes not equally so.
        length = min(map(len, streams))
        zipped = grain.experimental.ZipMapDataset([each[:length] for each in streams])
        dataset = zipped.to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.threads,
                prefetch_buffer_size=config.prefetch if config.threads else 0,
            )
        )
        rows = {
            name: np.arange(
                config.process_index, size, config.process_count, dtype=np.int32
            )
            for name, size in self._sizes.items()
        }
        asked = None
        if requests and config.streams.partner == "requested":
            reader = self._reader("unlabeled")
            asked = Requests(
                lambda place, rng: reader.crops(place, rng, [config.crop])[0],
                rows["partner"],
                config.seed,
                config.threads,
            )
        return TrainIterator(dataset, rows, asked, start_step)

    def _order(self, name: str) -> Order:
        labeled_epochs = self._config.epoch_of == "labeled"
        return Order(
            kind=self._config.streams.order,
            labeled=self.num_labeled,
            unlabeled=0 if labeled_epochs else self.num_unlabeled,
            batch_size=self._config.batch_size,
            groups=max(self._config.batch_size // self._config.group_size, 1),
            per_step=self._sizes[name],
            seed=self._config.seed,
        )

    def _reader(self, name: str) -> CropReader:
        if self.resident is not None:
            return self.resident.reader(name)
        ids = getattr(self.split, name)
        place = {key: i for i, key in enumerate(self._info.ids["train"])}
        return Reader(
            records=self._records,
            positions=np.array([place[key] for key in ids]),
            ids=ids,
            pixels=self._info.facts.pixels,
            geometry=host.build_geometry(self._config.streams.geometry),
            with_label=name == "labeled",
        )

    def _labeled(self) -> grain.MapDataset:
        config, source_crop = self._config, None
        if config.streams.source is not None:
            low, high = config.streams.source
            source_crop = dataclasses.replace(
                config.crop, scale_min=low, scale_max=high
            )
        read = ReadLabeled(self._reader("labeled"), config.crop, source_crop)
        return self._read("labeled", read)

    def _unlabeled(self) -> grain.MapDataset:
        again = ("partner",) if self._config.streams.partner == "same" else ()
        read = ReadUnlabeled(
            self._reader("unlabeled"), self._config.crop, ("unlabeled", *again)
        )
        return self._read("unlabeled", read)

    def _read(self, name: str, read: grain.transforms.RandomMap) -> grain.MapDataset:
        config = self._config
        dataset = self._order(name).build(name).random_map(read)
        dataset = dataset[config.process_index :: config.process_count]
        local = self._sizes[name] // config.process_count
        return dataset.batch(local, drop_remainder=True)
