"""A user's own images and masks.

    SOURCE/classes.json     {"classes": ["road", ...],
                             "palette": [[r,g,b], ...], "void": [[r,g,b], ...],
                             "binary": false}
                            only "classes" is needed, and not if given by hand
    SOURCE/images/          labelled images; folders inside are part of the id
    SOURCE/masks/           of images/a/b.jpg: masks/a/b.png (any image format)
    SOURCE/unlabeled/       optional: images without masks
    SOURCE/train.txt, val.txt    optional id lists, in either format of `lists`

An id is the path below images/ or unlabeled/ without the file's ending. Without val.txt
a tenth of the labelled images (by hash of the id) is held out; without train.txt
training takes the rest. Masks hold class indices (grey or palette PNG), or the colours
of the palette; with "binary" 0 and 255, which become classes 0 and 1.

Images are grey or RGB pictures, or all have the same number of channels (1 to 64) of
8 or 16 bits or float32: TIFF, .npy, 16-bit grey PNG.
"""

import collections
import hashlib
import pathlib

from mpmc_jax.data import images, lists
from mpmc_jax.data.builders import classes as classes_lib
from mpmc_jax.data.builders.base import SegmentationBuilder
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.lists import IMAGE_SUFFIXES, shorten
from mpmc_jax.data.source import Blob, Derived, Sample, Source, default_palette
from mpmc_jax.pixels import GREY, RGB, PixelFormat

_HELD_OUT = 10


class Folder(SegmentationBuilder, skip_registration=True):
    """The TFDS builder named "folder"."""


def read_source(directory: pathlib.Path, classes: tuple[str, ...] = ()) -> Source:
    """Describes the folder `directory`; what is amiss is in `.problems`.

    Args:
      directory: laid out as the module says.
      classes: class names; () reads them from classes.json.
    """
    problems: list[str] = []
    named = classes_lib.read(directory / "classes.json", classes, problems)
    pictures = _find(directory / "images", problems)
    masks = _find(directory / "masks", problems)
    bare: dict[str, pathlib.Path] = {}
    if (directory / "unlabeled").is_dir():
        bare = _find(directory / "unlabeled", problems)
    _compare(directory, pictures, masks, bare, problems)
    train, val = _assign(directory, sorted(pictures), frozenset(bare), problems)
    samples = {
        key: Sample(key, pictures[key], _as_mask(masks.get(key), named.binary))
        for key in pictures
    }
    unlabeled = [Sample(key, bare[key], None) for key in sorted(bare)]
    return Source(
        name="folder",
        class_names=named.names,
        palette=named.palette or default_palette(len(named.names)),
        pixels=_pixel_format([*pictures.values(), *bare.values()]),
        measure=True,
        splits={
            "train": tuple([samples[key] for key in train] + unlabeled),
            "val": tuple(samples[key] for key in val),
        },
        problems=tuple(problems),
        notes=tuple(_notes(directory, sorted(set(pictures) - {*train, *val}), val)),
        colors=named.colors(),
    )


def _find(directory: pathlib.Path, problems: list[str]) -> dict[str, pathlib.Path]:
    """Id -> file, for every image file at any depth."""
    if not directory.is_dir():
        problems.append(f"{directory}: no such folder")
        return {}
    found: dict[str, pathlib.Path] = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        key = path.relative_to(directory).with_suffix("").as_posix()
        if key in found:
            problems.append(f"{path}: {found[key].name} has the same id {key!r}")
        found[key] = path
    if not found:
        problems.append(f"{directory}: holds no image file {IMAGE_SUFFIXES}")
    return found


def _compare(
    directory: pathlib.Path,
    images: dict[str, pathlib.Path],
    masks: dict[str, pathlib.Path],
    bare: dict[str, pathlib.Path],
    problems: list[str],
) -> None:
    """Complains of images without masks, masks without images, ids used twice."""
    lonely = [str(images[key]) for key in sorted(images) if key not in masks]
    if lonely and masks:
        problems.append(
            f"{directory / 'masks'}: no mask for {shorten(lonely)}; "
            "images without masks belong in unlabeled/"
        )
    orphans = [str(masks[key]) for key in sorted(masks) if key not in images]
    if orphans and images:
        problems.append(f"{directory / 'images'}: no image for {shorten(orphans)}")
    both = sorted(set(images) & set(bare))
    if both:
        problems.append(f"{directory}: in images/ and in unlabeled/: {shorten(both)}")


def _assign(
    directory: pathlib.Path,
    ids: list[str],
    bare: frozenset[str],
    problems: list[str],
) -> tuple[list[str], list[str]]:
    """Labelled ids for training and for validation."""
    train = _read_list(directory / "train.txt", ids, bare, problems)
    val = _read_list(directory / "val.txt", ids, bare, problems)
    pool = ids if train is None else train
    if val is None:
        order = sorted(pool, key=lambda key: hashlib.sha256(key.encode()).digest())
        held_out = set(order[: max(len(order) // _HELD_OUT, 1)])
        return (
            [key for key in pool if key not in held_out],
            [key for key in pool if key in held_out],
        )
    chosen = set(val)
    both = sorted(chosen & set(train or ()))
    if both:
        problems.append(
            f"{directory}: train.txt and val.txt share {shorten(both)}; take them out "
            "of one"
        )
    return [key for key in pool if key not in chosen], val


def _notes(directory: pathlib.Path, unused: list[str], val: list[str]) -> list[str]:
    notes = []
    if not (directory / "val.txt").is_file():
        notes.append(
            f"{directory}: no val.txt; {len(val)} labelled images are held out for "
            f"validation: {shorten(val)}"
        )
    if unused:
        notes.append(
            f"{directory}: {len(unused)} labelled images stand in neither train.txt "
            f"nor val.txt and are not used: {shorten(unused)}"
        )
    return notes


def _read_list(
    path: pathlib.Path, ids: list[str], bare: frozenset[str], problems: list[str]
) -> list[str] | None:
    """The ids that a list names, less those amiss; None where there is no list."""
    if not path.is_file():
        return None
    try:
        lines = lists.read_lines(path)
    except ValueError as error:
        problems.append(str(error))
        return []
    known = frozenset(ids)
    found = [lists.resolve(line, known) for line in lines]
    absent = [line for line, key in zip(lines, found, strict=True) if key is None]
    maskless = [line for line in absent if lists.resolve(line, bare)]
    if maskless:
        problems.append(
            f"{path}: names images without a mask: {shorten(maskless)}; a list names "
            "labelled images, and all of unlabeled/ is trained on"
        )
    absent = [line for line in absent if line not in maskless]
    if absent:
        problems.append(
            f"{path}: names absent files: {shorten(absent)}; add them, or strike them "
            "off the list"
        )
    present = [key for key in found if key is not None]
    again = lists.repeated(present)
    if again:
        problems.append(f"{path}: repeats {shorten(again)}")
    return list(dict.fromkeys(present))


def _as_mask(path: pathlib.Path | None, binary: bool) -> Blob | None:
    if path is None or not binary:
        return path
    return Derived(path, str(path), classes_lib.from_binary)


def _pixel_format(paths: list[pathlib.Path]) -> PixelFormat:
    """What most images are, by their headers; GREY or RGB if all are pictures."""
    found: collections.Counter[PixelFormat] = collections.Counter()
    for path in paths:
        try:
            header = images.read_header(path.read_bytes())
        except (UnreadableImage, OSError):
            continue  # `check` names it.
        found[PixelFormat(header.channels, (0.0,), (1.0,), header.dtype)] += 1
    ((most, _),) = found.most_common(1) or [(RGB, 0)]
    if not images.is_bytes(most):
        return most
    grey = all(pixels.channels == 1 for pixels in found if images.is_bytes(pixels))
    return GREY if grey and found else RGB
