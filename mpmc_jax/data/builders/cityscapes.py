"""Cityscapes (Cordts et al., 2016), fine annotations, 19 classes.

    SOURCE/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    SOURCE/gtFine/{train,val}/CITY/NAME_gtFine_labelTrainIds.png, or
                                   NAME_gtFine_labelIds.png

labelTrainIds are used as they are. If more images have labelIds, these are mapped to
train ids instead. An id is the image's file name, NAME_leftImg8bit, with which lines of
the published lists end.

Masks of one kind under the name of the other are refused by their values: labelIds are
at most 33, and labelTrainIds are below 19 or 255.
"""

import pathlib

import numpy as np

from mpmc_jax.data import decode, files
from mpmc_jax.data.masks import decode_mask
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Derived, Sample, Source
from mpmc_jax.pixels import RGB
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
# The index is the train id; all other ids are void (cityscapesScripts, labels.py).
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
EXPECTED = {"train": 2975, "val": 500}
_IMAGE_END = "_leftImg8bit"
_KINDS = ("labelTrainIds", "labelIds")


def read_source(directory: pathlib.Path) -> Source:
    """Describes the Cityscapes folder `directory`; `.problems` lists what is wrong."""
    problems: list[str] = []
    images = {split: _find_images(directory, split, problems) for split in EXPECTED}
    everything = [path for paths in images.values() for path in paths]
    masks = {
        kind: {path: _mask_path(directory, path, kind) for path in everything}
        for kind in _KINDS
    }
    there = {
        kind: [path for path in everything if masks[kind][path].is_file()]
        for kind in _KINDS
    }
    kind = max(_KINDS, key=lambda kind: len(there[kind]))  # The first if equal.
    absent = [str(masks[kind][path]) for path in everything if path not in there[kind]]
    if absent:
        problems.append(
            f"{directory / 'gtFine'}: no mask for {len(absent)} of {len(everything)} "
            f"images: {shorten(absent, 3)}; extract gtFine_trainvaltest.zip again"
        )
    usable = frozenset(there[kind])
    notes = [f"{directory / 'gtFine'}: masks are read from *_gtFine_{kind}.png"]
    if others := _other_splits(directory):
        notes.append(f"{directory / 'leftImg8bit'}: not read: {shorten(others)}")
    return Source(
        name="cityscapes",
        class_names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        pixels=RGB,
        splits={
            split: tuple(
                Sample(path.stem, path, _mask(masks[kind][path], kind))
                for path in paths
                if path in usable
            )
            for split, paths in images.items()
        },
        problems=tuple(problems),
        notes=tuple(notes),
        expected=EXPECTED,
        unpacked=True,
        value_hint="labelIds named labelTrainIds? rename to *_gtFine_labelIds.png",
    )


def _other_splits(directory: pathlib.Path) -> list[str]:
    """Returns the folders beside train and val, such as test."""
    folder = directory / "leftImg8bit"
    there = files.visible(folder.iterdir()) if folder.is_dir() else []
    return [path.name for path in there if path.name not in EXPECTED]


def _find_images(
    directory: pathlib.Path, split: str, problems: list[str]
) -> list[pathlib.Path]:
    """Finds the images of all cities of a split; missing ones are problems."""
    folder = directory / "leftImg8bit" / split
    hint = "extract leftImg8bit_trainvaltest.zip again"
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder; {hint}")
        return []
    found = []
    empty = []
    for city in files.visible(path for path in folder.iterdir() if path.is_dir()):
        in_city = files.visible(city.glob(f"*{_IMAGE_END}.png"))
        found += in_city
        if not in_city:
            empty.append(str(city))
    if empty or not found:
        problems.append(f"{folder}: cities without images: {shorten(empty)}; {hint}")
    _report_orphans(directory, split, frozenset(found), problems)
    return found


def _report_orphans(
    directory: pathlib.Path,
    split: str,
    images: frozenset[pathlib.Path],
    problems: list[str],
) -> None:
    orphans = [
        str(path)
        for kind in _KINDS
        for path in files.visible(
            (directory / "gtFine" / split).glob(f"[!.]*/*_gtFine_{kind}.png")
        )
        if _image_path(directory, path, kind) not in images
    ]
    if orphans:
        problems.append(
            f"{directory / 'leftImg8bit' / split}: no image for "
            f"{quantity(len(orphans), 'mask')}: {shorten(orphans, 3)}; "
            "extract leftImg8bit_trainvaltest.zip again"
        )


def _image_path(directory: pathlib.Path, mask: pathlib.Path, kind: str) -> pathlib.Path:
    name = mask.name.removesuffix(f"_gtFine_{kind}.png") + f"{_IMAGE_END}.png"
    parent = mask.parent.relative_to(directory / "gtFine")
    return directory / "leftImg8bit" / parent / name


def _mask_path(directory: pathlib.Path, image: pathlib.Path, kind: str) -> pathlib.Path:
    name = image.stem.removesuffix(_IMAGE_END) + f"_gtFine_{kind}.png"
    parent = image.parent.relative_to(directory / "leftImg8bit")
    return directory / "gtFine" / parent / name


def _mask(path: pathlib.Path, kind: str) -> pathlib.Path | Derived:
    return Derived(path, str(path), to_train_ids) if kind == "labelIds" else path


def to_train_ids(content: bytes) -> bytes:
    """Converts a PNG of labelIds to a PNG of train ids.

    Raises:
      UnreadableImage: not a mask, or a mask of train ids.
    """
    label_hw = decode_mask(content)
    largest = int(label_hw.max())
    if largest > LABEL_IDS[-1]:
        raise UnreadableImage(
            f"holds value {largest}, and labelIds end at {LABEL_IDS[-1]}; "
            "labelTrainIds named labelIds? rename to *_gtFine_labelTrainIds.png"
        )
    table = np.full(256, IGNORE_LABEL, np.uint8)
    table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
    return decode.encode_png(table[label_hw])
