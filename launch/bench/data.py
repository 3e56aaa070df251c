"""Samples a second and core that the host makes, by stage, beside a plain pipeline.

The plain one is what a published loader does with Pillow: it resizes the whole image,
cuts, jitters and blurs twice, and hands over three views in float32. Ours cuts while it
resizes and hands over bytes; the views are made on the device.
"""

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from launch.bench.timing import resident_bytes, spread
from mpmc_jax.data import decode as encoded
from mpmc_jax.data.build import build_train, reading_threads
from mpmc_jax.data.geometry.cropping import CropConfig, size_of
from mpmc_jax.data.geometry.registry import build_geometry
from mpmc_jax.data.pipeline import RecordReader
from mpmc_jax.experiments.run import open_model_and_method
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Crops

# Of the made-up images, by their long side: what their rows are of it.
_ASPECTS = {500: 3 / 4, 2048: 1 / 2}


def bench_prepared(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Crops a second and core that the pipeline makes of a prepared data set.

    And the memory that the process holds at the end, JAX included.
    """
    _, _, method = open_model_and_method(config)
    pipeline = build_train(config, method.streams)
    iterator = pipeline.iterator()
    rng = np.random.default_rng(0)
    groups = config.train.batch_size // config.train.group_size

    def request(step: int) -> None:
        """As the device would: any images."""
        if method.delay:
            iterator.request(step, rng.integers(0, pipeline.num_unlabeled, groups))

    try:
        for step in range(method.delay + 1):
            request(step)
        next(iterator)
        begin, busy = time.perf_counter(), time.process_time()
        made = 0
        for step in range(1, 20 * repeats + 1):
            request(step + method.delay)
            batch = next(iterator)
            made += sum(
                part.image.shape[0]
                for part in jax.tree.leaves(
                    batch, is_leaf=lambda x: isinstance(x, Crops)
                )
            )
        wall, busy = time.perf_counter() - begin, time.process_time() - busy
    finally:
        iterator.close()
    return {
        "images_per_second": made / wall,
        "images_per_core_second": made / busy,
        "threads": reading_threads(config.data.threads),
        "records": pipeline.num_unlabeled,
        "resident_bytes": resident_bytes(),
    }


def bench_made_up(
    config: ml_collections.ConfigDict, repeats: int, *, images: int, largest: int
) -> dict[str, Any]:
    """Both pipelines in turns, on the same made-up images, from memory, in one thread.

    Args:
      config: crop size and scales.
      repeats: turns; a turn makes one sample of every image.
      images: how many.
      largest: their long side: 500 makes JPEGs as VOC's, 2048 PNGs as Cityscapes',
        which `prepare_data` transcodes for us to what decodes faster.

    Returns:
      Samples a core second of both, medians; their ratios' median; ours by stage.

    Raises:
      ValueError: another long side.
    """
    if largest not in _ASPECTS:
        raise ValueError(f"--largest={largest}: of data valid are {list(_ASPECTS)}")
    data = config.data
    crop = CropConfig(data.crop, data.scale_min, data.scale_max)
    files = made_up(images, largest)
    unpacked = largest == 2048
    records = [
        {"image": encoded.encode_record(each, RGB, unpacked=unpacked)} for each in files
    ]
    ours = _reader(records)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(repeats):
        for name, make in (
            ("ours", lambda i, rng: ours.crops(i, rng, [crop])),
            ("plain", lambda i, rng: plain_sample(files[i], rng, crop)),
        ):
            rng = np.random.default_rng(turn)
            busy = _busy(lambda i, m=make, r=rng: m(i, r), images)
            rates[name].append(images / busy)
    ratios = np.divide(rates["ours"], rates["plain"])
    return {
        "samples_per_core_second": float(np.median(rates["ours"])),
        "plain_samples_per_core_second": float(np.median(rates["plain"])),
        "over_plain": spread(ratios.tolist()),
        **_stages(records, ours, crop, config.train.batch_size),
    }


def _busy(make: Callable[[int], Any], number: int) -> float:
    begin = time.process_time()
    for i in range(number):
        make(i)
    return time.process_time() - begin


def _reader(records: Sequence[dict]) -> RecordReader:
    return RecordReader(
        records=records,
        record_numbers=np.arange(len(records)),
        ids=tuple(map(str, range(len(records)))),
        image_format="picture",
        pixels=RGB,
        draw=build_geometry("unimatch").draw,
        with_label=False,
    )


def _stages(
    records: Sequence[dict], reader: RecordReader, crop: CropConfig, batch_size: int
) -> dict[str, float]:
    """Core seconds a sample of every stage."""
    number = len(records)
    rng = np.random.default_rng(0)
    contents = [record["image"] for record in records]
    pictures = [encoded.record_image(content, "picture", RGB) for content in contents]
    cuts = [reader.draw(rng, size_of(picture), crop) for picture in pictures]
    crops = [
        cut.image(picture, crop, RGB)
        for cut, picture in zip(cuts, pictures, strict=True)
    ]

    def batch(i: int) -> None:
        if i % batch_size == 0:
            np.stack(crops[i : i + batch_size])

    stages = {
        "read": lambda i: records[i]["image"],
        "decode": lambda i: encoded.record_image(contents[i], "picture", RGB),
        "geometry": lambda i: cuts[i].image(pictures[i], crop, RGB),
        "batching": batch,
    }
    return {
        f"{name}_seconds_a_sample": _busy(stage, number) / number
        for name, stage in stages.items()
    }


def made_up(images: int, largest: int) -> list[bytes]:
    """Smooth colors with some grain: files about as large as photographs'."""
    rows = int(largest * _ASPECTS[largest])
    rng = np.random.default_rng(0)
    files = []
    for _ in range(images):
        coarse = rng.integers(0, 256, (rows // 25, largest // 25, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(
            (largest, rows), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 4, (rows, largest, 1))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        if largest == 500:
            Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        else:
            Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


@dataclasses.dataclass(frozen=True)
class PlainSample:
    """Three views as a published loader gives them: (3,s,s) float32, normalized."""

    weak: np.ndarray
    strong: tuple[np.ndarray, np.ndarray]


def plain_sample(
    content: bytes, rng: np.random.Generator, crop: CropConfig
) -> PlainSample:
    """UniMatch's order of work: resize all, pad, cut, mirror, jitter, blur, normalize.

    Source: UniMatch, dataset/semi.py and transform.py.
    """
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    long = max(picture.size)
    drawn = rng.integers(int(crop.scale_min * long), int(crop.scale_max * long) + 1)
    columns, rows = (int(drawn * side / long + 0.5) for side in picture.size)
    picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
    left = int(rng.integers(0, max(columns - crop.size, 0) + 1))
    top = int(rng.integers(0, max(rows - crop.size, 0) + 1))
    picture = picture.crop((left, top, left + crop.size, top + crop.size))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    strong = (_strong(picture, rng), _strong(picture, rng))
    return PlainSample(
        _normalized(picture), (_normalized(strong[0]), _normalized(strong[1]))
    )


def _strong(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.8:
        for name in rng.permutation(["Brightness", "Contrast", "Color", "hue"]):
            if name == "hue":
                picture = turn_hue(picture, int(255 * rng.uniform(-0.25, 0.25)))
            else:
                change = getattr(ImageEnhance, name)(picture)
                picture = change.enhance(rng.uniform(0.5, 1.5))
    if rng.random() < 0.2:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return picture


def turn_hue(picture: Image.Image, shift: int) -> Image.Image:
    """By `shift` of 256 steps around the color circle."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue, int) + shift).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _normalized(picture: Image.Image) -> np.ndarray:
    unit = np.asarray(picture, np.float32) / np.float32(255)
    mean, std = (np.asarray(v, np.float32) for v in (RGB.mean, RGB.std))
    return np.ascontiguousarray(np.moveaxis((unit - mean) / std, -1, 0))
