"""A user's own images and masks.

    SOURCE/classes.json     {"classes": ["road", ...],
                             "palette": [[r,g,b], ...], "void": [[r,g,b], 0, ...],
                             "binary": false, "nodata": [-9999, "nan"]}
                            only "classes" is needed, and not if given by hand
    SOURCE/images/          labeled images; folders inside are part of the id
    SOURCE/masks/           of images/a/b.jpg: masks/a/b.png (any image format)
    SOURCE/unlabeled/       optional: images without masks
    SOURCE/train.txt, val.txt, test.txt, labeled.txt, unlabeled.txt
                            optional id lists, in either format of `lists`; images/val/,
                            images/test/ and images/train/ do without: `folder_splits`

An id is the path below images/ or unlabeled/ without the file's ending, in composed
Unicode (NFC). Images that unlabeled.txt names, or that labeled.txt alone leaves out,
need no mask, and one that is there is not read.

Masks hold class indices (gray or palette PNG), or, with a palette in classes.json, its
colors; with "binary" 0 and 255, which become classes 0 and 1. "void" names values or
colors that do not count; classes have the other values in order, so that with [0] they
count from 1. "nodata" names values of images that stand for none: they become the
channel's mean, and void where every channel is missing.

Hidden files are no data, links are followed (see `files`), and a note counts whatever
else is not read.

Images are gray or RGB pictures, or all have the same number of channels (1 to 64) of
8 or 16 bits or float32: TIFF, .npy, 16-bit gray PNG.
"""

import collections
import dataclasses
import pathlib

from mpmc_jax.data import decode as images
from mpmc_jax.data import files
from mpmc_jax.data.builders import classes as classes_lib
from mpmc_jax.data.builders import folder_splits
from mpmc_jax.data.lists import IMAGE_SUFFIXES, composed, shorten
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import (
    Blob,
    Sample,
    Source,
    default_palette,
    read_original,
)
from mpmc_jax.pixels import GRAY, RGB, PixelFormat

# What SOURCE may hold; a note names everything else.
_PARTS = ("images", "masks", "unlabeled", "classes.json")


def read_source(directory: pathlib.Path, classes: tuple[str, ...] = ()) -> Source:
    """Describes the folder `directory`; what is amiss is in `.problems`.

    Args:
      directory: laid out as the module says.
      classes: class names; () reads them from classes.json.
    """
    problems: list[str] = []
    notes: list[str] = []
    named = classes_lib.read(directory / "classes.json", classes, problems)
    if problems:  # Told at once: masks mean nothing without classes.
        nothing = {"train": (), "val": ()}
        return Source("folder", named.names, (), RGB, nothing, tuple(problems))
    pictures = _find(directory / "images", problems, notes)
    masks = _find(directory / "masks", problems, notes)
    bare: dict[str, pathlib.Path] = {}
    if (directory / "unlabeled").is_dir():
        bare = _find(directory / "unlabeled", problems, notes, may_be_empty=True)
    chosen = folder_splits.assign(directory, sorted(pictures), sorted(bare), problems)
    maskless = frozenset(chosen.unlabeled)
    _compare(directory, pictures, masks, bare, maskless, problems)
    everything = {**bare, **pictures}

    def samples(keys: tuple[str, ...]) -> tuple[Sample, ...]:
        return tuple(Sample(key, pictures[key], masks.get(key)) for key in keys)

    unlabeled = tuple(Sample(key, everything[key], None) for key in chosen.unlabeled)
    splits = {"train": samples(chosen.labeled) + unlabeled}
    splits |= {split: samples(keys) for split, keys in chosen.held_out.items()}
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
        notes=(*chosen.notes, *notes, *_note_others(directory)),
        masks=named.masks,
    )


def _find(
    directory: pathlib.Path,
    problems: list[str],
    notes: list[str],
    *,
    may_be_empty: bool = False,
) -> dict[str, pathlib.Path]:
    """Id -> file, for every image file at any depth."""
    if not directory.is_dir():
        there = [path.name for path in files.visible(directory.parent.iterdir())]
        problems.append(f"{directory}: no such folder; there are {shorten(there)}")
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
    """Names what lies beside the folders and lists that are understood."""
    understood = {*_PARTS, *(f"{name}.txt" for name in folder_splits.LISTS)}
    others = [
        path.name + "/" * path.is_dir()
        for path in files.visible(directory.iterdir())
        if path.name not in understood
    ]
    return [f"{directory}: not read: {shorten(others)}"] if others else []


def _compare(
    directory: pathlib.Path,
    images: dict[str, pathlib.Path],
    masks: dict[str, pathlib.Path],
    bare: dict[str, pathlib.Path],
    maskless: frozenset[str],
    problems: list[str],
) -> None:
    """Complains of images without masks, masks without images, ids used twice."""
    lonely = [
        str(images[key])
        for key in sorted(images)
        if key not in masks and key not in maskless
    ]
    if lonely and masks:
        problems.append(
            f"{directory / 'masks'}: no mask for {shorten(lonely)}; "
            "images without masks belong in unlabeled/ or unlabeled.txt"
        )
    orphans = [str(masks[key]) for key in sorted(masks) if key not in images]
    if orphans and images:
        problems.append(
            f"{directory / 'images'}: no image for {shorten(orphans)}; a mask has the "
            "name of its image, and lies in folders of the same names"
        )
    both = sorted(set(images) & set(bare))
    if both:
        problems.append(f"{directory}: in images/ and in unlabeled/: {shorten(both)}")


def _pixel_format(blobs: list[Blob]) -> PixelFormat:
    """What most images are, by their headers; GRAY or RGB if all are pictures."""
    found: collections.Counter[PixelFormat] = collections.Counter()
    for blob in blobs:
        try:
            header = images.read_header(read_original(blob))
        except (UnreadableImage, OSError):
            continue  # `check` names it.
        found[PixelFormat(header.channels, (0.0,), (1.0,), header.dtype)] += 1
    ((most, _),) = found.most_common(1) or [(RGB, 0)]
    if not images.is_bytes(most):
        return most
    gray = all(pixels.channels == 1 for pixels in found if images.is_bytes(pixels))
    return GRAY if gray and found else RGB
