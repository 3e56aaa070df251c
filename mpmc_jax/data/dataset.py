"""Opening a prepared data set: its facts, and random access to its records."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mpmc_jax.data.builders.base import dataset_directory
from mpmc_jax.data.decode import Color
from mpmc_jax.data.records import Records
from mpmc_jax.pixels import PixelFormat


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What a run keeps of its data set: enough to predict where the data are not.

    Attributes:
      dataset: its name.
      class_names: index -> name.
      palette: index -> RGB color.
      pixels: how images are stored, and normalized.
      fingerprint: SHA-256 of the source it was prepared from.
      partial: whether it holds another number of images than the published data set.
    """

    dataset: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pixels: PixelFormat
    fingerprint: str
    partial: bool = False

    @property
    def num_classes(self) -> int:
        """Classes, void not counted."""
        return len(self.class_names)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "DatasetFacts":
        """The facts among the entries of a JSON object."""
        return cls(
            dataset=record["dataset"],
            class_names=tuple(record["class_names"]),
            palette=tuple(tuple(color) for color in record["palette"]),
            pixels=PixelFormat(**record["pixels"]),
            fingerprint=record["fingerprint"],
            partial=record.get("partial", False),
        )


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a prepared data set says of itself.

    Attributes:
      facts: classes, channels and fingerprint.
      directory: its folder.
      ids: split -> ids; position i is record i.
      contents: split -> SHA-256 of its records, see `builders.base`.
      present: id of each labeled image -> indices of the classes in its mask.
      volumes: id -> the volume that it is a slice of, where it is one.
      warnings: what `check` warned of when it was prepared, one line each.
    """

    facts: DatasetFacts
    directory: pathlib.Path
    ids: dict[str, tuple[str, ...]]
    present: dict[str, tuple[int, ...]]
    volumes: dict[str, str]
    contents: dict[str, str]
    warnings: tuple[str, ...] = ()

    def records(self, split: str) -> Records:
        """Its records, in the order of `ids`."""
        return Records(self.directory, split, self.ids[split])


def open_dataset(data_dir: str, name: str) -> DatasetInfo:
    """Reads the facts of the prepared data set `name` under `data_dir`.

    Raises:
      FileNotFoundError: it was not prepared there; the text has the command to run.
      ValueError: its facts are damaged.
    """
    directory = dataset_directory(data_dir, name)
    path = directory / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no prepared data set {name!r} in {data_dir!r} (looked for {path}); run: "
            f"python -m launch.prepare_data --dataset={name}"
            f"{'' if name == 'synthetic' else ' --source=DIR'} --data_dir={data_dir}"
        )
    try:
        facts = json.loads(path.read_text())
        return DatasetInfo(
            facts=DatasetFacts.read({"dataset": name, **facts}),
            directory=directory,
            ids={split: tuple(ids) for split, ids in facts["ids"].items()},
            present={key: tuple(value) for key, value in facts["present"].items()},
            volumes=facts["volumes"],
            contents=facts["contents"],
            warnings=tuple(facts["warnings"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged, or of another version ({error!r}); remove {directory} "
            "and prepare the data set again"
        ) from error
