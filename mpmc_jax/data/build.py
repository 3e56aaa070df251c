"""Builds data sets, splits and batches from a configuration."""

import dataclasses
import os

import ml_collections

from mpmc_jax.data import decode, registry, splits
from mpmc_jax.data.class_weights import median_frequency_weights
from mpmc_jax.data.dataset import DatasetInfo, EvalDataset, open_dataset
from mpmc_jax.data.geometry.cropping import ClassFocus, CropConfig
from mpmc_jax.data.pipeline import PipelineConfig, TrainPipeline
from mpmc_jax.models.registry import encoder_normalization
from mpmc_jax.pixels import NORMALIZATIONS, PixelFormat
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import Streams

# Values of `data.partner`.
PARTNERS = ("same", "other")


def dataset_info(config: ml_collections.ConfigDict) -> DatasetInfo:
    """Opens the configured data set, with the configured normalization.

    Raises:
      ValueError: an unknown name or normalization, or one that does not fit the images.
      FileNotFoundError: the data set was not prepared.
    """
    registry.find(config.data.name)
    info = open_dataset(config.data.data_dir, config.data.name)
    encoder = encoder_normalization(config.model.name, config.model.backbone)
    pixels = normalization(config.data.normalization, info.facts.pixels, encoder)
    return dataclasses.replace(
        info, facts=dataclasses.replace(info.facts, pixels=pixels)
    )


def normalization(name: str, pixels: PixelFormat, encoder: str) -> PixelFormat:
    """Returns a pixel format with the mean and deviation of `data.normalization`.

    Args:
      name: the value of `data.normalization`.
      pixels: the data set's pixel format.
      encoder: the encoder's normalization, a key of `NORMALIZATIONS`.

    Raises:
      ValueError: an unknown name, or one for RGB images without three channels.
    """
    if name == "auto":
        rgb = decode.is_picture(pixels) and pixels.channels == 3
        name = encoder if rgb else "dataset"
    if name == "dataset":
        return pixels
    if name == "none":
        return dataclasses.replace(pixels, mean=(0.0,), std=(1.0,))
    if name not in NORMALIZATIONS:
        raise ValueError(
            f"data.normalization={name!r} is unknown; valid: auto, dataset, "
            f"{', '.join(NORMALIZATIONS)}, none"
        )
    if pixels.channels != 3:
        raise ValueError(
            f"data.normalization={name!r} needs 3 channels, and the images have "
            f"{pixels.channels}; use 'dataset' or 'none'"
        )
    mean, std = NORMALIZATIONS[name]
    return dataclasses.replace(pixels, mean=mean, std=std)


def build_split(config: ml_collections.ConfigDict, info: DatasetInfo) -> splits.Split:
    """Reads the configured split from its id lists, or draws it if there are none.

    Raises:
      FileNotFoundError, ValueError: see `splits`.
    """
    data = config.data
    ids = info.ids["train"]
    present = {key: info.present[key] for key in ids if key in info.present}
    if data.labeled_ids:
        split = splits.read_split(ids, present, data.labeled_ids, data.unlabeled_ids)
    elif data.unlabeled_ids:
        raise ValueError(
            "data.unlabeled_ids is given without data.labeled_ids; give both lists"
        )
    else:
        split = splits.draw_split(ids, present, data.split, data.split_seed)
    if not data.allow_absent_classes:
        splits.check_classes(split, present, info.facts.class_names)
    return split


def build_class_weights(
    config: ml_collections.ConfigDict, split: splits.Split
) -> tuple[float, ...]:
    """Returns the configured weight of each class; () for none.

    Raises:
      ValueError: not one number per class, or a mask cannot be read.
    """
    given = tuple(config.imbalance.class_weights)
    if not given:
        return ()
    info = dataset_info(config)
    if given == ("frequencies",):
        return median_frequency_weights(info, split.labeled)
    numbers = all(isinstance(weight, int | float) for weight in given)
    if not numbers or len(given) != info.facts.num_classes:
        raise ValueError(
            f"imbalance.class_weights={given}: give one number for each of the "
            f"{quantity(info.facts.num_classes, 'class')} "
            f"{shorten([*info.facts.class_names], 12)}, frequencies to count them, or "
            "() for none"
        )
    return tuple(map(float, given))


def build_train(
    config: ml_collections.ConfigDict,
    streams: Streams,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainPipeline:
    """Builds the configured training pipeline.

    Args:
      config: the run's configuration.
      streams: the crops that the method asks for.
      process_index: index of this process.
      process_count: number of processes.

    Raises:
      FileNotFoundError, ValueError: data set, split or settings are not usable.
    """
    info = dataset_info(config)
    problems = splits.check_labels(info.facts.dataset, info.ids, info.present)
    if problems:
        raise ValueError("; ".join(problems))
    data = config.data
    streams = _configured(streams, data)
    crop_config = CropConfig(
        size=data.crop,
        scale_min=data.scale_min,
        scale_max=data.scale_max,
        scale_base=data.scale_base,
        flip=data.flip,
        fill=streams.fill,
        focus=_build_focus(config, streams, info),
    )
    settings = PipelineConfig(
        batch_size=config.train.batch_size,
        group_size=config.train.group_size,
        crop_config=crop_config,
        streams=streams,
        epoch_of=config.train.epoch_of,
        seed=config.seed,
        threads=reading_threads(data.threads),
        prefetch=data.prefetch,
        resident=data.resident,
        process_index=process_index,
        process_count=process_count,
    )
    return TrainPipeline(info, build_split(config, info), settings)


def reading_threads(threads: int) -> int:
    """Returns `threads`, or for -1 the number of CPUs of this process, at most 16."""
    if threads != -1:
        return threads
    # macOS has no affinity.
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(cpus, 16)


def _build_focus(
    config: ml_collections.ConfigDict, streams: Streams, info: DatasetInfo
) -> ClassFocus | None:
    """Returns the configured focus of labeled crops on classes; None without one.

    Raises:
      ValueError: classes that there are not, or crops that are whole images.
    """
    imbalance = config.imbalance
    if not imbalance.crop_probability:
        return None
    if streams.geometry == "acdc":
        raise ValueError(
            f"imbalance.crop_probability={imbalance.crop_probability}: with "
            "data.geometry='acdc' crops are whole images; leave it at 0"
        )
    count = info.facts.num_classes
    classes = tuple(imbalance.crop_classes) or tuple(range(1, count))
    # 1.0 is in a range, too, but is no index.
    if not all(isinstance(label, int) and label in range(count) for label in classes):
        raise ValueError(
            f"imbalance.crop_classes={classes}: give numbers of the classes 0 to "
            f"{count - 1}, or () for all but class 0"
        )
    return ClassFocus(imbalance.crop_probability, classes)


def _configured(streams: Streams, data: ml_collections.ConfigDict) -> Streams:
    """Returns the method's streams with the configured geometry and partners."""
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


def build_eval(config: ml_collections.ConfigDict, split: str = "val") -> EvalDataset:
    """Opens the labeled images of one split of the configured data set.

    Raises:
      FileNotFoundError, ValueError: see `dataset_info` and `EvalDataset`.
    """
    return EvalDataset(dataset_info(config), split)
