"""The training pipeline: from prepared records to batches of crops, by grain.

    sampling -> read a record, decode it, crop it (random_map)
        -> take this process's rows -> batch -> zip the streams

`random_map` comes after the endless repetition and before the sharding, so the random
numbers of an example depend on the seed and its position in the global order. They
differ between epochs and streams, and are the same for any number of threads or
processes. The iterator's position is the training step.

Further crops that a method wants with an example (`Streams`) are made with it: a second
crop of the same decoded image, or a labeled crop to copy objects from.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from mpmc_jax.data import decode
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.device_cache import DeviceCache
from mpmc_jax.data.geometry.cropping import CropConfig, size_of, to_bytes
from mpmc_jax.data.geometry.focus import focused
from mpmc_jax.data.geometry.registry import Draw, build_geometry
from mpmc_jax.data.partner_loader import PartnerLoader
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.sampling import EpochOrder
from mpmc_jax.data.splits import Split
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL, Batch, Crops, Streams

# The arrays of one crop by name; with a device cache some are trees of arrays.
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of the training pipeline.

    Attributes:
      batch_size: labeled images per step, over all processes.
      group_size: number of images that are mixed and ranked among themselves.
      crop_config: size of crops, and range of the random resize.
      streams: the crops that the method asks for.
      epoch_of: the list that an epoch passes over, "unlabeled" or "labeled".
      seed: seed of order and geometry.
      threads: reading threads, and as many again for requested partners. With 0 the
        calling thread reads; requested partners then have one thread.
      prefetch: batches prepared ahead if there are threads, at least one for each.
      resident: whether images are cached on the device, and batches hold plans of their
        crops (`data.crop_plan`) instead of pixels.
      process_index: index of this process.
      process_count: number of processes that share the global batch.
    """

    batch_size: int
    group_size: int
    crop_config: CropConfig
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


class CropReader(Protocol):
    """Makes crops of the images of one list; positions count in that list."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the list's images."""
        ...

    def crops(
        self, position: int, rng: np.random.Generator, configs: Sequence[CropConfig]
    ) -> list[Arrays]:
        """Makes one crop of an image for each of the configs, drawn in that order."""
        ...

    def empty_crop(self, size: int) -> Arrays:
        """Makes a crop without a real pixel."""
        ...


@dataclasses.dataclass(frozen=True)
class RecordReader:
    """Reads, decodes and crops the images of one list.

    Attributes:
      records: the training images.
      record_numbers: position in the list -> number of its record.
      ids: position in the list -> id, for error messages.
      image_format: how records hold images, see `decode.image_format`.
      pixels: the pixel format of the images.
      draw: draws where a crop comes from.
      with_label: whether masks are read too. If not, images are converted to uint8
        even if they are stored with more bits.
    """

    records: Sequence[dict]
    record_numbers: np.ndarray
    ids: tuple[str, ...]
    image_format: str
    pixels: PixelFormat
    draw: Draw
    with_label: bool

    def crops(
        self, position: int, rng: np.random.Generator, configs: Sequence[CropConfig]
    ) -> list[Arrays]:
        """Makes one crop of an image for each of the configs, drawn in that order.

        Raises:
          ValueError: the image cannot be read; the message names its record.
        """
        record = self.records[int(self.record_numbers[position])]
        try:
            decoded = decode.record_image(
                record["image"], self.image_format, self.pixels
            )
            label_hw = decode.record_label(record["mask"]) if self.with_label else None
        except UnreadableImage as error:
            raise ValueError(f"record {self.ids[position]!r}: {error}") from error
        crops = []
        for crop_config in configs:
            cut = self.draw(rng, size_of(decoded), crop_config)
            if label_hw is not None and crop_config.focus is not None:
                cut = focused(rng, cut, label_hw, crop_config.focus)
            image = cut.image(decoded, crop_config, self.pixels)
            crop = {"extent": cut.extent(), "index": np.array(position, np.int32)}
            if label_hw is None:
                crop |= {"image": to_bytes(image, self.pixels)}
            else:
                crop |= {"image": image, "label": cut.label(label_hw, crop_config)}
            crops.append(crop)
        return crops

    def empty_crop(self, size: int) -> Arrays:
        """Makes a crop without a real pixel."""
        return {
            "image": np.zeros((size, size, self.pixels.channels), self.pixels.dtype),
            "extent": np.zeros(4, np.int32),
            "index": np.array(0, np.int32),
            "label": np.full((size, size), IGNORE_LABEL, np.uint8),
        }


@dataclasses.dataclass(frozen=True)
class ReadLabeled(grain.transforms.RandomMap):
    """Maps a position in the labeled list to crops by stream.

    With a `source_crop_config`, half of the examples get a crop of another labeled
    image to copy objects from, and the others an empty one. It is drawn before the
    example's own crop, as in the published code.
    """

    reader: CropReader
    crop_config: CropConfig
    source_crop_config: CropConfig | None

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        crops = {}
        if self.source_crop_config is not None:
            crops["source"] = self.reader.empty_crop(self.crop_config.size)
            if rng.random() < 0.5:
                other = int(rng.integers(len(self.reader.ids)))
                (crops["source"],) = self.reader.crops(
                    other, rng, [self.source_crop_config]
                )
        (crops["labeled"],) = self.reader.crops(element, rng, [self.crop_config])
        return crops


@dataclasses.dataclass(frozen=True)
class ReadUnlabeled(grain.transforms.RandomMap):
    """Maps a position in the unlabeled list to one crop for each named stream."""

    reader: CropReader
    crop_config: CropConfig
    names: tuple[str, ...]

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        crops = self.reader.crops(element, rng, [self.crop_config] * len(self.names))
        return dict(zip(self.names, crops, strict=True))


class TrainIterator(Iterator[Batch]):
    """Iterates over batches from a given step on; `close` it when done.

    After n batches the state is {"next_index": n}, whatever the threads have
    prefetched.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        rows: dict[str, np.ndarray],
        partners: PartnerLoader | None,
        start_step: int,
    ):
        self._iterator: Any = iter(dataset)
        self._rows: Any = rows
        self._partners = partners
        self.set_state({"next_index": start_step})

    def __next__(self) -> Batch:
        step = self.get_state()["next_index"]
        crops = {k: v for part in next(self._iterator) for k, v in part.items()}
        if self._partners is not None:
            crops["partner"] = self._partners.take(step)
        # Arrays are NumPy here and become jax.Array when the batch is placed.
        return Batch(
            **{k: Crops(batch_index=self._rows[k], **v) for k, v in crops.items()}
        )

    def request(self, step: int, images: np.ndarray) -> None:
        """Requests the partners of `step`: one unlabeled position per group."""
        if self._partners is not None:
            self._partners.request(step, images)

    def get_state(self) -> dict[str, int]:
        """Returns {"next_index": step of the next batch}."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to the step of a saved state."""
        self._iterator.set_state({"next_index": int(state["next_index"])})

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()
        if self._partners is not None:
            self._partners.close()


class TrainPipeline:
    """The training batches of one run, a function of data, split and seed.

    Attributes:
      split: the ids of the labeled and of the unlabeled training images.
      steps_per_epoch: see `EpochOrder`.
      num_labeled: number of distinct labeled images.
      num_unlabeled: number of unlabeled images, which the method may leave unused.
      repetition: passes over the labeled list per epoch.
      unused: labeled images that no epoch uses, see `EpochOrder`.
      device_cache: makes crops of the batches' plans if images are cached on the
        device, else None.
      warnings: the warnings of `check` when the data set was prepared.

    Raises:
      ValueError: the method needs unlabeled images and the split has none; see also
        `DeviceCache`.
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
        self.device_cache: DeviceCache | None = None
        if config.resident:
            self.device_cache = DeviceCache(
                info, split, config.streams.geometry, config.crop_config
            )

    def iterator(self, start_step: int = 0, *, requests: bool = True) -> TrainIterator:
        """Returns endless batches, beginning with that of `start_step`.

        Arrays are NumPy and hold this process's rows: process p of P has the rows
        p, p+P, ... of the global batch, which `Crops.batch_index` names.

        Args:
          start_step: the step of the first batch.
          requests: whether batches hold requested partners, for which the caller must
            call `request`.
        """
        config = self._config
        streams = [self._labeled()]
        if config.streams.unlabeled:
            streams.append(self._unlabeled())
        if config.streams.partner == "other":
            read = ReadUnlabeled(
                self._reader("unlabeled"), config.crop_config, ("partner",)
            )
            streams.append(self._stream("partner", read))
        # Every stream is endless in practice; lengths differ with the batch sizes.
        length = min(map(len, streams))
        zipped = grain.experimental.ZipMapDataset([each[:length] for each in streams])
        dataset = zipped.to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.threads,
                # A thread reads a whole batch, so that each needs a place for one.
                prefetch_buffer_size=max(config.prefetch, config.threads)
                if config.threads
                else 0,
            )
        )
        rows = {
            name: np.arange(
                config.process_index, size, config.process_count, dtype=np.int32
            )
            for name, size in self._sizes.items()
        }
        partners = None
        if requests and config.streams.partner == "requested":
            reader = self._reader("unlabeled")

            def read_partner(position: int, rng: np.random.Generator) -> Arrays:
                (crop,) = reader.crops(position, rng, [config.crop_config])
                return crop

            partners = PartnerLoader(
                read_partner, rows["partner"], config.seed, config.threads
            )
        return TrainIterator(dataset, rows, partners, start_step)

    def _order(self, name: str) -> EpochOrder:
        labeled_epochs = self._config.epoch_of == "labeled"
        return EpochOrder(
            kind=self._config.streams.order,
            labeled=self.num_labeled,
            unlabeled=0 if labeled_epochs else self.num_unlabeled,
            batch_size=self._config.batch_size,
            published_processes=max(
                self._config.batch_size // self._config.group_size, 1
            ),
            per_step=self._sizes[name],
            seed=self._config.seed,
        )

    def _reader(self, name: str) -> CropReader:
        if self.device_cache is not None:
            return self.device_cache.reader(name)
        ids = getattr(self.split, name)
        numbers = {key: i for i, key in enumerate(self._info.ids["train"])}
        return RecordReader(
            records=self._records,
            record_numbers=np.array([numbers[key] for key in ids]),
            ids=ids,
            image_format=self._info.image_format,
            pixels=self._info.facts.pixels,
            draw=build_geometry(self._config.streams.geometry).draw,
            with_label=name == "labeled",
        )

    def _labeled(self) -> grain.MapDataset:
        config, source_crop_config = self._config, None
        if config.streams.source_scales is not None:
            low, high = config.streams.source_scales
            source_crop_config = dataclasses.replace(
                config.crop_config, scale_min=low, scale_max=high, focus=None
            )
        read = ReadLabeled(
            self._reader("labeled"), config.crop_config, source_crop_config
        )
        return self._stream("labeled", read)

    def _unlabeled(self) -> grain.MapDataset:
        partner = ("partner",) if self._config.streams.partner == "same" else ()
        read = ReadUnlabeled(
            self._reader("unlabeled"), self._config.crop_config, ("unlabeled", *partner)
        )
        return self._stream("unlabeled", read)

    def _stream(self, name: str, read: grain.transforms.RandomMap) -> grain.MapDataset:
        """Returns this process's batches of a stream."""
        config = self._config
        dataset = self._order(name).build(name).random_map(read)
        dataset = dataset[config.process_index :: config.process_count]
        local = self._sizes[name] // config.process_count
        return dataset.batch(local, drop_remainder=True)
