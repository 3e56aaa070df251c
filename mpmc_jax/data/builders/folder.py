"""A user's own images and masks.

    SOURCE/classes.json     {"classes": ["road", ...],
                             "palette": [[r,g,b], ...], "void": [[r,g,b], 0, ...],
                             "binary": false, "nodata": [-9999, "nan"]}
                            only "classes" is required, unless given by --classes
    SOURCE/images/          labeled images; subfolders are part of the id
    SOURCE/masks/           of images/a/b.jpg: masks/a/b.png (any image format), or
                            annotated shapes; `own.layout` and `own.annotations` list
                            further layouts
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
import difflib
import pathlib
from collections.abc import Iterable, Mapping

from mpmc_jax.data import decode, files
from mpmc_jax.data.builders import classes as classes_lib
from mpmc_jax.data.builders import folder_splits
from mpmc_jax.data.lists import IMAGE_SUFFIXES
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.data.own import annotations as annotations_lib
from mpmc_jax.data.own import layout as layout_lib
from mpmc_jax.data.own import names as names_lib
from mpmc_jax.data.own import unlabeled as unlabeled_lib
from mpmc_jax.data.own.layout import UNLABELED_FOLDERS
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import (
    Blob,
    Sample,
    Source,
    default_palette,
    read_original,
)
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.text import quantity, shorten

# What SOURCE may hold, besides the lists; a note names everything else.
_PARTS = ("images", "masks", "classes.json", "config.py")
# nnU-Net's folder of images without masks.
_NNUNET_TESTS = "imagests"
# How alike the names of an image and its mask are if one is misspelled, 0 to 1.
_ALIKE = 0.8


def read_source(
    directory: pathlib.Path, classes: tuple[str, ...] = (), unlabeled: str = ""
) -> Source:
    """Describes the folder `directory`; `.problems` lists what is wrong.

    Args:
      directory: a folder with the layout above.
      classes: class names; () reads them from classes.json.
      unlabeled: more images without masks, see `own.unlabeled`; "" for none.
    """
    problems: list[str] = []
    notes: list[str] = []
    named = classes_lib.read(directory / "classes.json", classes, problems)
    if problems:  # Without classes masks cannot be checked.
        no_samples = {"train": (), "val": ()}
        return Source("folder", named.names, (), RGB, no_samples, tuple(problems))
    found = open_folder(directory, problems, notes)
    unlabeled_files = find_unlabeled(directory, unlabeled, found, problems, notes)
    pictures, masks = found.layout.images, found.masks(named.names)
    if found.annotations is not None:
        without = {key: pictures[key] for key in pictures if key not in masks}
        unlabeled_files |= without
        pictures = {key: pictures[key] for key in pictures if key in masks}
        if without:
            notes.append(
                f"{directory}: {quantity(len(without), 'image')} without annotations "
                f"used as unlabeled: {shorten([*without])}"
            )
    assigned = folder_splits.assign(
        directory, sorted(pictures), sorted(unlabeled_files), problems
    )
    need_no_mask = frozenset(assigned.unlabeled)
    _compare(directory, found, unlabeled_files, need_no_mask, problems)
    all_files = {**unlabeled_files, **pictures}

    def samples(keys: tuple[str, ...]) -> tuple[Sample, ...]:
        return tuple(Sample(key, pictures[key], masks.get(key)) for key in keys)

    without_masks = tuple(
        Sample(key, all_files[key], None) for key in assigned.unlabeled
    )
    splits = {"train": samples(assigned.labeled) + without_masks}
    splits |= {split: samples(keys) for split, keys in assigned.held_out.items()}
    notes += _note_others(
        directory, named.names, found, unlabeled, unlabeled_files.values()
    )
    pixels = _pixel_format([s.image for split in splits.values() for s in split])
    return Source(
        name="folder",
        class_names=named.names,
        palette=named.palette or default_palette(named.names),
        pixels=dataclasses.replace(pixels, nodata=named.nodata or ()),
        ask_nodata=named.nodata is None,
        measure=True,
        splits=splits,
        problems=tuple(problems),
        notes=(*assigned.notes, *notes),
        masks=named.masks if found.annotations is None else MaskFormat(),
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a user's folder holds, before the classes are known.

    Attributes:
      layout: its images and mask files.
      annotations: annotated shapes, if there are no mask files.
    """

    layout: layout_lib.Layout
    annotations: annotations_lib.Annotations | None

    def masks(self, class_names: tuple[str, ...]) -> Mapping[str, Blob]:
        """Returns the masks by id."""
        if self.annotations is None:
            return self.layout.masks
        return self.annotations.masks(class_names)


def open_folder(
    directory: pathlib.Path, problems: list[str], notes: list[str]
) -> Folder:
    """Finds images with masks or annotations; `read_source` has the arguments."""
    layout = layout_lib.find(directory, problems)
    notes += layout.notes
    annotations, before = None, len(problems)
    if not layout.masks_folder and not layout.masks:
        annotations = annotations_lib.find(directory, layout.images, problems, notes)
        if annotations is None:
            if len(problems) == before:
                layout_lib.report_absent(directory, layout, problems)
        else:
            count = quantity(len(annotations.drawings), "image")
            notes.append(
                f"{directory}: masks are drawn from {annotations.kind} annotations of "
                f"{count}"
            )
    return Folder(layout, annotations)


def find_unlabeled(
    directory: pathlib.Path,
    more: str,
    found: Folder,
    problems: list[str],
    notes: list[str],
) -> dict[str, pathlib.Path]:
    """Finds the images of unlabeled/ and elsewhere, by id.

    Args:
      directory: the user's folder.
      more: images elsewhere, see `own.unlabeled`; "" for none.
      found: the other files of the folder.
      problems, notes: get one line for each.
    """
    images: dict[str, pathlib.Path] = {}
    for prefix, folder in layout_lib.named_folders(
        directory, layout_lib.UNLABELED_FOLDERS
    ):
        below = layout_lib.collect(folder, problems, notes, prefix)
        if not below and files.find(folder, IMAGE_SUFFIXES, []).unread:
            problems.append(f"{folder}: holds no image file {IMAGE_SUFFIXES}")
        images |= below
    if more:
        labeled = found.layout.images.values()
        images |= unlabeled_lib.find(more, labeled, problems, notes)
    return images


def _note_others(
    directory: pathlib.Path,
    class_names: tuple[str, ...],
    found: Folder,
    unlabeled: str,
    images: Iterable[pathlib.Path],
) -> list[str]:
    """Returns a note on files and folders that have no meaning here, or [].

    Args:
      directory: the user's folder.
      class_names: its classes; a list of other names had no effect.
      found: its images and masks.
      unlabeled: see `read_source`.
      images: the images without masks.
    """
    known = {*_PARTS, *found.layout.read}
    known |= {f"{name}.txt" for name in folder_splits.LISTS}
    if found.annotations is not None:
        known |= found.annotations.read
    listed = names_lib.find(directory)
    if listed.path is not None and listed.agrees(class_names):
        known.add(listed.path.name)
    root = directory.resolve()
    given = {path.parent for path in images}
    given |= {pathlib.Path(unlabeled)} if unlabeled else set()
    for path in (each.resolve() for each in given):
        if path.is_relative_to(root):
            known.update(path.relative_to(root).parts[:1])
    others = [
        path
        for path in files.visible(directory.iterdir())
        if path.name not in known and path.name.lower() not in UNLABELED_FOLDERS
    ]
    if not others:
        return []
    note = shorten([path.name + "/" * path.is_dir() for path in others])
    tests = [path for path in others if path.name.lower() == _NNUNET_TESTS]
    hint = f"; --unlabeled={tests[0]} reads its images" if tests else ""
    return [f"{directory}: not read: {note}{hint}"]


def _compare(
    directory: pathlib.Path,
    found: Folder,
    unlabeled: Mapping[str, pathlib.Path],
    need_no_mask: frozenset[str],
    problems: list[str],
) -> None:
    """Adds problems: images without masks, masks without images, ids used twice."""
    images, masks = found.layout.images, found.layout.masks
    without_mask = [
        str(images[key])
        for key in sorted(images)
        if key not in masks and key not in need_no_mask
    ]
    orphans = [str(masks[key]) for key in sorted(masks) if key not in images]
    if without_mask and masks:
        folder = directory / (found.layout.masks_folder or "masks")
        alike = _alike(without_mask, orphans)
        problems.append(
            f"{folder}: no mask for {shorten(without_mask)}; "
            f"images without masks belong in unlabeled/ or unlabeled.txt{alike}"
        )
    if orphans and images:
        problems.append(
            f"{directory}: no image for {shorten(orphans)}; a mask must have the name "
            "of its image, in folders of the same names"
        )
    both = sorted(set(images) & set(unlabeled))
    if both and found.annotations is None:
        problems.append(
            f"{directory}: both in images/ and in unlabeled/: {shorten(both)}"
        )


def _alike(images: list[str], masks: list[str]) -> str:
    """Returns a guess which mask without an image belongs to an image, or ""."""
    for image in images:
        name = pathlib.PurePath(image).name
        names = [pathlib.PurePath(mask).name for mask in masks]
        close = difflib.get_close_matches(name, names, 1, _ALIKE)
        if close:
            return f"; is {close[0]} the mask of {name}? Give it that name"
    return ""


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
