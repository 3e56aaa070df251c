"""CamVid road scenes in SegNet's 11-class version (Brostow et al., 2009).

SOURCE/train.txt, SOURCE/val.txt    "image label" on each line, relative paths
"""

import pathlib

from mpmc_jax.data import lists
from mpmc_jax.data.builders.base import SegmentationBuilder
from mpmc_jax.data.lists import shorten
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import RGB

CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "vehicle": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class Camvid(SegmentationBuilder, skip_registration=True):
    """The TFDS builder named "camvid"."""


def read_source(directory: pathlib.Path) -> Source:
    """Describes the CamVid folder `directory`; what is amiss is in `.problems`."""
    problems: list[str] = []
    splits = {
        split: _read_list(directory, f"{split}.txt", problems)
        for split in ("train", "val")
    }
    both = sorted({s.id for s in splits["train"]} & {s.id for s in splits["val"]})
    if both:
        problems.append(f"train.txt and val.txt share {shorten(both)}")
    return Source(
        name="camvid",
        class_names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        pixels=RGB,
        splits=splits,
        problems=tuple(problems),
    )


def _read_list(
    directory: pathlib.Path, name: str, problems: list[str]
) -> tuple[Sample, ...]:
    path = directory / name
    try:
        lines = lists.read_lines(path)
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
        return ()
    if not lines:
        problems.append(f"{path}: empty list")
    samples = []
    for line in lines:
        files = line.split()
        if len(files) != 2:
            problems.append(f"{path}: not an image and a mask: {line!r}")
            continue
        image, mask = (directory / file for file in files)
        absent = [str(file) for file in (image, mask) if not file.is_file()]
        if absent:
            problems.append(f"{path}: names absent files: {shorten(absent)}")
            continue
        samples.append(Sample(pathlib.PurePosixPath(files[0]).stem, image, mask))
    again = lists.repeated([sample.id for sample in samples])
    if again:
        problems.append(f"{path}: repeats {shorten(again)}")
    return tuple(samples)
