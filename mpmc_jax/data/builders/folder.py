"""A user's own images and masks.

    SOURCE/classes.json     {"classes": ["road", ...],
                             "palette": [[r,g,b], ...], "void": [[r,g,b], 0, ...],
                             "binary": false, "nodata": [-9999, "nan"]}
                            only "classes" is required, unless given by --classes
    SOURCE/images/          labeled images; subfolders are part of the id
    SOURCE/masks/           of images/a/b.jpg: masks/a/b.png (any image format)
    SOURCE/unlabeled/       optional: images without masks
    SOURCE/train.txt, val.txt, test.txt, labeled.txt, unlabeled.txt
                            optional id lists, in either format of `lists`; instead of
                            them images/val/, images/test/ and images/train/ are used,
                            see `folder_splits`

An id is the path below images/ or unlabeled/ without the file's ending, in composed
Unicode (NFC). Images in unlabeled.txt, or missing from labeled.txt if that is the only
list, need no mask; if they have one, it is not read.

Masks hold class indices (gray or palette PNG); with a palette in classes.json they hold
its colors; with "binary" they hold 0 and 255, which become classes 0 and 1. "void"
lists values or colors that are not classes; the other values are the classes, in order,
so that with [0] classes count from 1. "nodata" lists image values that stand for
missing data: they become the channel's mean, and pixels without any channel are void.

Hidden files are skipped, links are followed (see `files`), and a note counts all other
files that are not read.

Images are gray or RGB pictures, or all have the same number of channels (1 to 64) of 8
or 16 bits or float32: TIFF, .npy, 16-bit gray PNG.
"""

import collections
import dataclasses
import pathlib

from mpmc_jax.data import decode, files
from mpmc_jax.data.builders import classes as classes_lib
from mpmc_jax.data.builders import folder_splits
from mpmc_jax.data.lists import IMAGE_SUFFIXES, composed
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import (
    Blob,
    Sample,
    Source,
    default_palette,
    read_original,
)
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.text import shorten

# What SOURCE may hold, besides the lists; a note names everything else.
_PARTS = ("images", "masks", "unlabeled", "classes.json")


def read_source(directory: pathlib.Path, classes: tuple[str, ...] = ()) -> Source:
    """Describes the folder `directory`; `.problems` lists what is wrong.

    Args:
      directory: a folder with the layout above.
      classes: class names; () reads them from classes.json.
    """
    problems: list[str] = []
    notes: list[str] = []
    named = classes_lib.read(directory / "classes.json", classes, problems)
    if problems:  # Without classes masks cannot be checked.
        no_samples = {"train": (), "val": ()}
        return Source("folder", named.names, (), RGB, no_samples, tuple(problems))
    pictures = _find(directory / "images", problems, notes)
    masks = _find(directory / "masks", problems, notes)
    unlabeled_files: dict[str, pathlib.Path] = {}
    if (directory / "unlabeled").is_dir():
        unlabeled_files = _find(
            directory / "unlabeled", problems, notes, may_be_empty=True
        )
    assigned = folder_splits.assign(
        directory, sorted(pictures), sorted(unlabeled_files), problems
    )
    need_no_mask = frozenset(assigned.unlabeled)
    _compare(directory, pictures, masks, unlabeled_files, need_no_mask, problems)
    all_files = {**unlabeled_files, **pictures}

    def samples(keys: tuple[str, ...]) -> tuple[Sample, ...]:
        return tuple(Sample(key, pictures[key], masks.get(key)) for key in keys)

    unlabeled = tuple(Sample(key, all_files[key], None) for key in assigned.unlabeled)
    splits = {"train": samples(assigned.labeled) + unlabeled}
    splits |= {split: samples(keys) for split, keys in assigned.held_out.items()}
    pixels = _pixel_format([s.image for split in splits.values() for s in split])
    return Source(
        name="folder",
        class_names=named.names,
        palette=named.palette or default_palette(len(named.names)),
        pixels=dataclasses.replace(pixels, nodata=named.nodata or ()),
        ask_nodata=named.nodata is None,
        measure=True,
        splits=splits,
        problems=tuple(problems),
        notes=(*assigned.notes, *notes, *_note_others(directory)),
        masks=named.masks,
    )


def _find(
    directory: pathlib.Path,
    problems: list[str],
    notes: list[str],
    *,
    may_be_empty: bool = False,
) -> dict[str, pathlib.Path]:
    """Finds the image files at any depth, by id."""
    if not directory.is_dir():
        there = [path.name for path in files.visible(directory.parent.iterdir())]
        problems.append(f"{directory}: no such folder; beside it are {shorten(there)}")
        return {}
    below = files.find(directory, IMAGE_SUFFIXES, problems)
    notes += below.note(directory)
    found: dict[str, pathlib.Path] = {}
    for path in below.read:
        key = composed(path.relative_to(directory).with_suffix("").as_posix())
        if key in found:
            problems.append(f"{path}: {found[key].name} has the same id {key!r}")
        found[key] = path
    if not found and (below.unread or not may_be_empty):
        problems.append(f"{directory}: holds no image file {IMAGE_SUFFIXES}")
    return found


def _note_others(directory: pathlib.Path) -> list[str]:
    """Returns a note on files and folders that have no meaning here, or []."""
    known = {*_PARTS, *(f"{name}.txt" for name in folder_splits.LISTS)}
    others = [
        path.name + "/" * path.is_dir()
        for path in files.visible(directory.iterdir())
        if path.name not in known
    ]
    return [f"{directory}: not read: {shorten(others)}"] if others else []


def _compare(
    directory: pathlib.Path,
    images: dict[str, pathlib.Path],
    masks: dict[str, pathlib.Path],
    unlabeled: dict[str, pathlib.Path],
    need_no_mask: frozenset[str],
    problems: list[str],
) -> None:
    """Adds problems: images without masks, masks without images, ids used twice."""
    without_mask = [
        str(images[key])
        for key in sorted(images)
        if key not in masks and key not in need_no_mask
    ]
    if without_mask and masks:
        problems.append(
            f"{directory / 'masks'}: no mask for {shorten(without_mask)}; "
            "images without masks belong in unlabeled/ or unlabeled.txt"
        )
    orphans = [str(masks[key]) for key in sorted(masks) if key not in images]
    if orphans and images:
        problems.append(
            f"{directory / 'images'}: no image for {shorten(orphans)}; a mask must "
            "have the name of its image, in folders of the same names"
        )
    both = sorted(set(images) & set(unlabeled))
    if both:
        problems.append(
            f"{directory}: both in images/ and in unlabeled/: {shorten(both)}"
        )


def _pixel_format(blobs: list[Blob]) -> PixelFormat:
    """Returns the most common format by headers; GRAY or RGB for pictures."""
    found: collections.Counter[PixelFormat] = collections.Counter()
    for blob in blobs:
        try:
            header = decode.read_header(read_original(blob))
        except (UnreadableImage, OSError):
            continue  # `check` reports it.
        found[PixelFormat(header.channels, (0.0,), (1.0,), header.dtype)] += 1
    ((most, _),) = found.most_common(1) or [(RGB, 0)]
    if not decode.is_picture(most):
        return most
    gray = all(pixels.channels == 1 for pixels in found if decode.is_picture(pixels))
    return GRAY if gray and found else RGB
