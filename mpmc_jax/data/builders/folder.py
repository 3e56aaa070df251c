"""A user's own images and masks.

    SOURCE/classes.json     {"classes": ["road", ...],
                             "palette": [[r,g,b], ...], "void": [[r,g,b], ...]}
                            only "classes" is needed, and not if given by hand
    SOURCE/images/          labelled images; folders inside are part of the id
    SOURCE/masks/           of images/a/b.jpg: masks/a/b.png (any image format)
    SOURCE/unlabeled/       optional: images without masks
    SOURCE/train.txt, val.txt    optional id lists, in either format of `lists`

An id is the path below images/ or unlabeled/ without the file's ending. Without val.txt
a tenth of the labelled images (by hash of the id) is held out; without train.txt
training takes the rest. Masks hold class indices (grey or palette PNG), or the colours
of the palette.
"""

import hashlib
import json
import pathlib

from PIL import Image

from mpmc_jax.data import lists
from mpmc_jax.data.builders.base import SegmentationBuilder
from mpmc_jax.data.source import (
    IMAGE_SUFFIXES,
    Color,
    Sample,
    Source,
    default_palette,
    shorten,
)
from mpmc_jax.pixels import GREY, RGB, PixelFormat
from mpmc_jax.types import IGNORE_LABEL

_HELD_OUT = 10
_KEYS = ("classes", "palette", "void")
_GREY_MODES = ("1", "L", "LA")


class Folder(SegmentationBuilder, skip_registration=True):
    """The TFDS builder named "folder"."""


def read_source(directory: pathlib.Path, classes: tuple[str, ...] = ()) -> Source:
    """Describes the folder `directory`; what is amiss is in `.problems`.

    Args:
      directory: laid out as the module says.
      classes: class names; () reads them from classes.json.
    """
    problems: list[str] = []
    names, palette, void = _read_classes(directory, classes, problems)
    images = _find(directory / "images", problems)
    masks = _find(directory / "masks", problems)
    bare: dict[str, pathlib.Path] = {}
    if (directory / "unlabeled").is_dir():
        bare = _find(directory / "unlabeled", problems)
    _compare(directory, images, masks, bare, problems)
    train, val = _assign(directory, sorted(images), frozenset(bare), problems)
    samples = {key: Sample(key, images[key], masks.get(key)) for key in images}
    unlabeled = [Sample(key, bare[key], None) for key in sorted(bare)]
    colors = None
    if palette:
        colors = {color: i for i, color in enumerate(palette)}
        colors |= dict.fromkeys(void, IGNORE_LABEL)
    return Source(
        name="folder",
        class_names=names,
        palette=palette or default_palette(len(names)),
        pixels=_pixel_format([*images.values(), *bare.values()]),
        splits={
            "train": tuple([samples[key] for key in train] + unlabeled),
            "val": tuple(samples[key] for key in val),
        },
        problems=tuple(problems),
        notes=tuple(_notes(directory, sorted(set(images) - {*train, *val}), val)),
        colors=colors,
    )


def _read_classes(
    directory: pathlib.Path, classes: tuple[str, ...], problems: list[str]
) -> tuple[tuple[str, ...], tuple[Color, ...], tuple[Color, ...]]:
    """Class names, their colours and the colours of void; () where not given."""
    path = directory / "classes.json"
    facts: dict = {}
    if path.is_file():
        try:
            facts = json.loads(path.read_text())
        except ValueError as error:
            problems.append(f"{path}: not JSON ({error})")
            return classes, (), ()
        if not isinstance(facts, dict):
            problems.append(f'{path}: not an object; write {{"classes": ["...", ...]}}')
            return classes, (), ()
        unknown = sorted(set(facts) - set(_KEYS))
        if unknown:
            problems.append(
                f"{path}: unknown keys {shorten(unknown)}; valid: {shorten([*_KEYS])}"
            )
    listed = facts.get("classes", [])
    if not _is_list_of(str, listed):
        problems.append(f'{path}: "classes" is not a list of names: {listed!r}')
        listed = []
    names = classes or tuple(listed)
    if not names:
        problems.append(f'{path}: no class names; write {{"classes": ["...", ...]}}')
    if len(names) > IGNORE_LABEL:
        problems.append(f"{path}: {len(names)} classes; labels are 8 bits, 255 is void")
    if len(set(names)) != len(names):
        problems.append(f"{path}: repeats {shorten(lists.repeated(list(names)))}")
    palette, void = (_colors(facts, key, path, problems) for key in ("palette", "void"))
    if palette and len(palette) != len(names):
        problems.append(f"{path}: {len(palette)} colours for {len(names)} classes")
    again = lists.repeated([*palette, *void])
    if again:
        problems.append(f"{path}: colours that mean two things: {shorten(again)}")
    return names, palette, void


def _colors(
    facts: dict, key: str, path: pathlib.Path, problems: list[str]
) -> tuple[Color, ...]:
    colors = facts.get(key, [])
    if not _is_list_of(list, colors):
        problems.append(f"{path}: {key!r} is not a list of [r,g,b]: {colors!r}")
        return ()
    wrong = [
        color
        for color in colors
        if len(color) != 3
        or not all(isinstance(v, int) and 0 <= v < 256 for v in color)
    ]
    if wrong:
        problems.append(f"{path}: {key}: not 8-bit [r,g,b]: {shorten(wrong)}")
        return ()
    return tuple(tuple(color) for color in colors)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


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
        problems.append(f"{directory}: train.txt and val.txt share {shorten(both)}")
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
        problems.append(f"{path}: names absent files: {shorten(absent)}")
    present = [key for key in found if key is not None]
    again = lists.repeated(present)
    if again:
        problems.append(f"{path}: repeats {shorten(again)}")
    return list(dict.fromkeys(present))


def _pixel_format(paths: list[pathlib.Path]) -> PixelFormat:
    """GREY if every readable image is grey, else RGB; from headers alone."""
    modes = set()
    for path in paths:
        try:
            with Image.open(path) as image:
                modes.add(image.mode)
        except OSError:
            continue  # `check` names it.
    return GREY if modes and modes <= set(_GREY_MODES) else RGB
