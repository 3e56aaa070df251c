"""A prepared data set: its metadata, its records, and whole images for evaluation."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mpmc_jax.data import decode, registry, splits
from mpmc_jax.data.builders import base
from mpmc_jax.data.decode import Color
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import first_line


class Records(Sequence[dict]):
    """Random access to the records of one split, which stay encoded.

    A record is {"id", "image", "mask", "labeled"}; the first three are bytes. Nothing
    is decoded, so accessing a record costs no more than reading its bytes.

    Args:
      directory: the prepared data set's folder.
      split: the split to read.
      ids: the records' ids, which error messages name.

    Raises:
      ValueError: a file is missing or damaged. A damaged record raises when it is
        accessed; the message names it.
    """

    def __init__(self, directory: pathlib.Path, split: str, ids: Sequence[str]):
        self._directory = directory
        self._split = split
        self._ids = ids
        skip = tfds.decode.SkipDecoding()
        # A decorator of TFDS hides the signature from type checkers.
        as_data_source: Any = tfds.builder_from_directory(directory).as_data_source
        try:
            self._source = as_data_source(
                split=split, decoders={"image": skip, "mask": skip}
            )
        # C++, TFDS and the file system each raise their own errors for damaged files.
        except Exception as error:
            raise self._damaged(f"the records of {split}", error) from error
        if len(self._source) != len(ids):
            error = ValueError(f"{len(self._source)} records for {len(ids)} ids")
            raise self._damaged(f"the records of {split}", error)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: Any) -> Any:
        if not -len(self) <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        try:
            return self._source[position]
        except Exception as error:
            name = f"record {self._ids[position]!r} of {self._split}"
            raise self._damaged(name, error) from error

    def _damaged(self, what: str, error: Exception) -> ValueError:
        return ValueError(
            f"{what} cannot be read from {self._directory} ({first_line(error)}): "
            "remove that folder and prepare the data set again"
        )


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What a run saves about its data set, enough to predict on another machine.

    Attributes:
      dataset: name of the data set.
      class_names: index -> name.
      palette: index -> RGB color.
      pixels: how images are stored and normalized.
      fingerprint: SHA-256 of the source that it was prepared from.
      partial: whether its number of images differs from the published data set's.
    """

    dataset: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pixels: PixelFormat
    fingerprint: str
    partial: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes, without void."""
        return len(self.class_names)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "DatasetFacts":
        """Creates the facts from the entries of a JSON object."""
        return cls(
            dataset=stored["dataset"],
            class_names=tuple(stored["class_names"]),
            palette=tuple(tuple(color) for color in stored["palette"]),
            pixels=PixelFormat(**stored["pixels"]),
            fingerprint=stored["fingerprint"],
            partial=stored.get("partial", False),
        )


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The metadata of a prepared data set.

    Attributes:
      facts: name, classes, pixel format and fingerprint.
      directory: folder of the prepared data set.
      image_format: how records hold images, see `decode.image_format`.
      ids: split -> ids; position i is record i.
      contents: split -> SHA-256 of its records, see `builders.base`.
      present: id of each labeled image -> indices of the classes in its mask.
      volumes: id of a slice -> id of its volume; other images are left out.
      warnings: the warnings of `check` at preparation, one line each.
    """

    facts: DatasetFacts
    directory: pathlib.Path
    image_format: str
    ids: dict[str, tuple[str, ...]]
    present: dict[str, tuple[int, ...]]
    volumes: dict[str, str]
    contents: dict[str, str]
    warnings: tuple[str, ...] = ()

    def records(self, split: str) -> Records:
        """Returns the records of a split, in the order of `ids`."""
        return Records(self.directory, split, self.ids[split])


def is_prepared(data_dir: str, name: str) -> bool:
    """Returns whether the data set `name` lies complete below `data_dir`."""
    return base.is_complete(base.dataset_directory(data_dir, name))


def open_dataset(data_dir: str, name: str) -> DatasetInfo:
    """Reads the metadata of the prepared data set `name` below `data_dir`.

    Raises:
      FileNotFoundError: it was not prepared there, or by a release that wrote another
        version of the data; the message holds the command to run.
      ValueError: the metadata are damaged.
    """
    directory = base.dataset_directory(data_dir, name)
    path = directory / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(_not_prepared(data_dir, name))
    try:
        metadata = json.loads(path.read_text())
        return DatasetInfo(
            facts=DatasetFacts.read({"dataset": name, **metadata}),
            directory=directory,
            image_format=metadata["image_format"],
            ids={split: tuple(ids) for split, ids in metadata["ids"].items()},
            present={key: tuple(value) for key, value in metadata["present"].items()},
            volumes=metadata["volumes"],
            contents=metadata["contents"],
            warnings=tuple(metadata["warnings"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error!r}); remove {directory} and prepare the data set "
            "again"
        ) from error


def _not_prepared(data_dir: str, name: str) -> str:
    """Returns the message for a data set that has to be prepared, or prepared again."""
    command = registry.prepare_command(name, data_dir)
    directory = base.dataset_directory(data_dir, name)
    others = [
        other.name
        for other in sorted(directory.parent.glob("[0-9]*"))
        if base.is_complete(other)
    ]
    if others:
        return (
            f"{directory.parent}: the data set was prepared as version "
            f"{', '.join(others)}, and this release reads version {base.VERSION}; "
            f"prepare it again: {command}"
        )
    return (
        f"no prepared data set {name!r} in {data_dir!r} (looked for "
        f"{directory / 'metadata.json'}); run: {command}"
    )


def has_changed(
    source: Source, data_dir: str, digests: Mapping[str, bytes] | None = None
) -> bool:
    """Returns whether the prepared data set was made from another source.

    Args:
      source: the source as it is now.
      data_dir: folder of all prepared data sets.
      digests: see `Source.fingerprint`.
    """
    prepared = open_dataset(data_dir, source.name).facts
    return source.fingerprint(digests) != prepared.fingerprint


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One whole image with its label.

    Attributes:
      id: id of the image.
      image: (h,w,c) as the data set stores it.
      label: (h,w) uint8, 255 for void.
    """

    id: str
    image: np.ndarray
    label: np.ndarray


class EvalDataset:
    """The labeled images of one split of a prepared data set, in order.

    Attributes:
      ids: ids of the images.
      volumes: id of the volume of each slice, "" for images that are no slice. The
        slices of a volume follow one another, in order.

    Raises:
      ValueError: the data set has no such split, or the split has no labeled pixel.
    """

    def __init__(self, info: DatasetInfo, split: str):
        self.info = info
        if split not in info.ids:
            raise ValueError(
                f"{info.facts.dataset!r} in {info.directory} was prepared without a "
                f"split {split!r}; it has {sorted(info.ids)}"
            )
        self._positions = [
            i for i, key in enumerate(info.ids[split]) if key in info.present
        ]
        problems = splits.check_labels(
            info.facts.dataset, {split: info.ids[split]}, info.present
        )
        if problems:
            raise ValueError(problems[0])
        self._records = info.records(split)
        self._sizes: dict[int, tuple[int, int]] = {}
        self.ids = tuple(info.ids[split][i] for i in self._positions)
        self.volumes = tuple(info.volumes.get(key, "") for key in self.ids)

    def __len__(self) -> int:
        return len(self._positions)

    def size(self, index: int) -> tuple[int, int]:
        """Returns rows and columns of an image; the first call reads its header."""
        if index not in self._sizes:
            content = self._records[self._positions[index]]["image"]
            self._sizes[index] = decode.record_size(content, self.info.image_format)
        return self._sizes[index]

    def __getitem__(self, index: int) -> EvalExample:
        """Decodes one image and its label.

        Raises:
          ValueError: the record cannot be decoded; the message names it.
        """
        record = self._records[self._positions[index]]
        info = self.info
        try:
            decoded = decode.record_image(
                record["image"], info.image_format, info.facts.pixels
            )
            label = decode.record_label(record["mask"])
        except UnreadableImage as error:
            raise ValueError(f"record {self.ids[index]!r}: {error}") from error
        return EvalExample(self.ids[index], decode.as_array(decoded), label)
