"""The data sets by name: how each is read from its source folder, and prepared.

A data set is one file in `builders/`, with a function that describes the folder as a
`Source`, and one entry of `DATASETS`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from mpmc_jax.data.builders import (
    acdc,
    base,
    camvid,
    cityscapes,
    folder,
    synthetic,
    voc,
)
from mpmc_jax.data.source import Source
from mpmc_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a data set becomes a `Source`.

    Attributes:
      read_source: describes the source folder. It takes the folder; for the user's
        `own` data also class names and unlabeled images that the user gave; nothing if
        the data set is `generated`.
      generated: whether images are computed, so that there is no source folder.
      own: whether this is the user's own data, so that class names and unlabeled images
        may be given on the command line.
    """

    read_source: Callable[..., Source]
    generated: bool = False
    own: bool = False


DATASETS: dict[str, Dataset] = {
    "synthetic": Dataset(synthetic.make_source, generated=True),
    "folder": Dataset(folder.read_source, own=True),
    "camvid": Dataset(camvid.read_source),
    "voc": Dataset(voc.read_source),
    "cityscapes": Dataset(cityscapes.read_source),
    "acdc": Dataset(acdc.read_source),
}


def find(name: str) -> Dataset:
    """Returns the registry entry of the data set `name`.

    Raises:
      ValueError: there is none; the message lists the valid names.
    """
    if name not in DATASETS:
        raise ValueError(
            f"unknown data set {name!r}; {did_you_mean(name, DATASETS)}one of "
            f"{', '.join(DATASETS)}"
        )
    return DATASETS[name]


def read_source(
    name: str, directory: str, classes: tuple[str, ...] = (), unlabeled: str = ""
) -> Source:
    """Describes the data set `name` whose source folder is `directory`.

    Args:
      name: a key of `DATASETS`.
      directory: the source folder; "" for a generated data set.
      classes: class names that the user gave; () for the data set's own.
      unlabeled: more unlabeled images that the user gave, see `own.unlabeled`; "" for
        none.

    Raises:
      ValueError: an unknown name; a folder for a generated data set; class names or
        unlabeled images for a data set that has its own.
      FileNotFoundError: the folder is missing or empty.
    """
    dataset = find(name)
    takes = " or ".join(key for key, each in DATASETS.items() if each.own)
    if classes and not dataset.own:
        raise ValueError(
            f"--classes={','.join(classes)}: {name} has classes of its own; the "
            f"argument is for --dataset={takes}"
        )
    if unlabeled and not dataset.own:
        raise ValueError(
            f"--unlabeled={unlabeled}: {name} has images of its own; the argument is "
            f"for --dataset={takes}"
        )
    if dataset.generated:
        if directory:
            raise ValueError(
                f"--source={directory}: {name} is generated and has no source folder; "
                "leave --source out"
            )
        return dataset.read_source()
    path = pathlib.Path(directory)
    if not directory:
        raise FileNotFoundError(
            f"--source=DIR is missing: give the source folder of {name!r}"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"--source={directory}: no such folder; give the source folder of {name!r}"
        )
    if not any(path.iterdir()):
        raise FileNotFoundError(f"--source={directory}: the folder is empty")
    if dataset.own:
        return dataset.read_source(path, classes, unlabeled)
    return dataset.read_source(path)


def prepare(
    source: Source,
    present: dict[str, tuple[int, ...]],
    data_dir: str,
    digests: Mapping[str, bytes] | None = None,
    warnings: Sequence[str] = (),
) -> pathlib.Path:
    """Writes a checked source below `data_dir`; returns the data set's folder.

    Args:
      source, present, data_dir: see `SegmentationBuilder`.
      digests: see `Source.fingerprint`.
      warnings: see `DatasetInfo`.

    Raises:
      FileExistsError, OSError: see `base.write`.
    """
    find(source.name)
    return base.write(
        base.SegmentationBuilder(
            source=source,
            present=present,
            data_dir=data_dir,
            digests=digests,
            warnings=warnings,
        )
    )


def prepare_command(name: str, data_dir: str) -> str:
    """Returns the command that prepares the data set `name` below `data_dir`."""
    source = "" if find(name).generated else " --source=DIR"
    return (
        f"python -m launch.prepare_data --dataset={name}{source} --data_dir={data_dir}"
    )
