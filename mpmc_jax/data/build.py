"""The door between configurations, names and the data code."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from mpmc_jax.data import decode, splits
from mpmc_jax.data.builders import (
    acdc,
    base,
    camvid,
    cityscapes,
    folder,
    synthetic,
    voc,
)
from mpmc_jax.data.dataset import DatasetInfo, open_dataset
from mpmc_jax.data.evaluation_source import EvalSource
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.data.pipeline import PipelineConfig, TrainPipeline
from mpmc_jax.data.source import Source
from mpmc_jax.pixels import RGB, PixelFormat
from mpmc_jax.types import Streams

BUILDERS: dict[str, type[base.SegmentationBuilder]] = {
    "synthetic": synthetic.Synthetic,
    "folder": folder.Folder,
    "camvid": camvid.Camvid,
    "voc": voc.Voc,
    "cityscapes": cityscapes.Cityscapes,
    "acdc": acdc.Acdc,
}

# What `data.partner` may say.
PARTNERS = ("same", "other")

# Each takes the source folder, and class names given by hand, which `folder` reads.
SOURCES: dict[str, Callable[[pathlib.Path, tuple[str, ...]], Source]] = {
    "synthetic": lambda directory, classes: synthetic.make_source(),
    "folder": folder.read_source,
    "camvid": lambda directory, classes: camvid.read_source(directory),
    "voc": lambda directory, classes: voc.read_source(directory),
    "cityscapes": lambda directory, classes: cityscapes.read_source(directory),
    "acdc": lambda directory, classes: acdc.read_source(directory),
}


def _known(name: str) -> str:
    if name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; one of {', '.join(BUILDERS)}")
    return name


def read_source(name: str, directory: str, classes: tuple[str, ...] = ()) -> Source:
    """Describes the data set `name` that lies in `directory`.

    Raises:
      ValueError: unknown name (the text lists the valid ones), or a folder for what
        has none.
      FileNotFoundError: the folder is missing or empty.
    """
    _known(name)
    if name == "synthetic":
        if directory:
            raise ValueError(f"--source={directory}: synthetic is made, it has none")
    else:
        folder_path = pathlib.Path(directory)
        if not directory:
            raise FileNotFoundError(
                f"--source=DIR is needed: the data set's ({name!r})"
            )
        if not folder_path.is_dir():
            raise FileNotFoundError(
                f"--source={directory}: no such folder; give the data set's ({name!r})"
            )
        if not any(folder_path.iterdir()):
            raise FileNotFoundError(f"--source={directory}: the folder is empty")
    return SOURCES[name](pathlib.Path(directory), classes)


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
    builder = BUILDERS[_known(source.name)]
    return base.write(
        builder(
            source=source,
            present=present,
            data_dir=data_dir,
            digests=digests,
            warnings=warnings,
        )
    )


def is_prepared(data_dir: str, name: str) -> bool:
    """Whether the data set is there in full."""
    return base.is_complete(base.dataset_directory(data_dir, _known(name)))


def has_changed(
    source: Source, data_dir: str, digests: Mapping[str, bytes] | None = None
) -> bool:
    """Whether the source is another than the prepared data set was made from.

    Args:
      source, data_dir: see `prepare`.
      digests: see `Source.fingerprint`.
    """
    prepared = open_dataset(data_dir, source.name).facts
    return source.fingerprint(digests) != prepared.fingerprint


def dataset_info(config: ml_collections.ConfigDict) -> DatasetInfo:
    """The facts of the configured data set, its images normalized as configured.

    Raises:
      ValueError: unknown name; a normalization that is unknown or does not fit.
      FileNotFoundError: it was not prepared.
    """
    info = open_dataset(config.data.data_dir, _known(config.data.name))
    pixels = normalization(config.data.normalization, info.facts.pixels)
    return dataclasses.replace(
        info, facts=dataclasses.replace(info.facts, pixels=pixels)
    )


def normalization(name: str, pixels: PixelFormat) -> PixelFormat:
    """A data set's format with the figures that `data.normalization` names.

    Raises:
      ValueError: unknown, or ImageNet's for images that are not RGB.
    """
    if name == "auto":
        rgb = decode.is_bytes(pixels) and pixels.channels == 3
        name = "imagenet" if rgb else "dataset"
    if name == "dataset":
        return pixels
    if name == "none":
        return dataclasses.replace(pixels, mean=(0.0,), std=(1.0,))
    if name != "imagenet":
        raise ValueError(
            f"data.normalization={name!r} is unknown; valid: auto, dataset, imagenet, "
            "none"
        )
    if pixels.channels != 3:
        raise ValueError(
            f"data.normalization='imagenet': it is for 3 channels, and the images have "
            f"{pixels.channels}; use 'dataset' or 'none'"
        )
    return dataclasses.replace(pixels, mean=RGB.mean, std=RGB.std)


def build_split(config: ml_collections.ConfigDict, info: DatasetInfo) -> splits.Split:
    """The configured split: from two id lists if given, else drawn.

    Raises:
      FileNotFoundError, ValueError: see `splits`.
    """
    data = config.data
    ids = info.ids["train"]
    present = {key: info.present[key] for key in ids if key in info.present}
    if data.labeled_ids:
        split = splits.read_split(ids, present, data.labeled_ids, data.unlabeled_ids)
    elif data.unlabeled_ids:
        raise ValueError("data.unlabeled_ids is given without data.labeled_ids")
    else:
        split = splits.draw_split(ids, present, data.split, data.split_seed)
    if not data.allow_absent_classes:
        splits.check_classes(split, present, info.facts.class_names)
    return split


def build_train(
    config: ml_collections.ConfigDict,
    streams: Streams,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainPipeline:
    """The configured training batches, of what the method asks for in `streams`.

    Raises:
      FileNotFoundError, ValueError: anything amiss with data set, split or settings.
    """
    info = dataset_info(config)
    problems = splits.check_labels(info.facts.dataset, info.ids, info.present)
    if problems:
        raise ValueError("; ".join(problems))
    data = config.data
    streams = _configured(streams, data)
    crop = CropConfig(
        size=data.crop,
        scale_min=data.scale_min,
        scale_max=data.scale_max,
        scale_base=data.scale_base,
        flip=data.flip,
        fill=streams.fill,
    )
    settings = PipelineConfig(
        batch_size=config.train.batch_size,
        group_size=config.train.group_size,
        crop=crop,
        streams=streams,
        epoch_of=config.train.epoch_of,
        seed=config.seed,
        threads=data.threads,
        prefetch=data.prefetch,
        resident=data.resident,
        process_index=process_index,
        process_count=process_count,
    )
    return TrainPipeline(info, build_split(config, info), settings)


def _configured(streams: Streams, data: ml_collections.ConfigDict) -> Streams:
    """What the method asks for, with geometry and partners as configured."""
    if data.geometry != "auto":
        streams = dataclasses.replace(streams, geometry=data.geometry)
    if data.partner == "auto":
        return streams
    if data.partner not in PARTNERS or streams.partner not in PARTNERS:
        raise ValueError(
            f"data.partner={data.partner!r}: valid are auto, and for methods that mix "
            f"partner crops (unimatch) {', '.join(PARTNERS)}"
        )
    return dataclasses.replace(streams, partner=data.partner)


def build_eval(config: ml_collections.ConfigDict, split: str = "val") -> EvalSource:
    """Whole labeled images of one split of the configured data set.

    Raises:
      FileNotFoundError, ValueError: see `dataset_info` and `EvalSource`.
    """
    return EvalSource(dataset_info(config), split)
