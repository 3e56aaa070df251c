"""Finds the images and masks of a user's folder, and pairs them by name.

Any of these, where the folders may also be called as in `IMAGE_FOLDERS` and
`MASK_FOLDERS`, and have subfolders:

    images/a/b.jpg, masks/a/b.png               the usual layout, id a/b
    train/images/b.jpg, train/masks/b.png       id train/b
    images/b.jpg, images/b_mask.png             side by side, also in SOURCE itself

An id is the path of the image without the folder of images and without its ending, in
composed Unicode (NFC). A mask has the id of its image. Otherwise it is paired by its
name without a word such as "_mask" or "gt_", then by that of the image without a word
such as "IMG_" or without nnU-Net's "_0000" of its only channel, or, if that is unique,
by its file name.
"""

import collections
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable

from mpmc_jax.data import files
from mpmc_jax.data.lists import IMAGE_SUFFIXES, composed
from mpmc_jax.text import quantity, shorten

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "imagestr")
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "segmentationclass",
    "masks_machine",
    "labelstr",
)
UNLABELED_FOLDERS = ("unlabeled", "unlabelled")

_MASK_WORDS = (
    "masks?|labels?|labelids|labeltrainids|seg|segmentation|gt|gtfine|l|annotations?|"
    "ground_?truth|target"
)
_IMAGE_WORDS = "images?|img|im|leftimg8bit|rgb|sat|photo|input"


_SUFFIXES = "|".join(map(re.escape, IMAGE_SUFFIXES))


def _affixes(words: str, numbered: str) -> re.Pattern[str]:
    """Returns a pattern of what surrounds the name that image and mask share.

    It is one of `words` at the beginning or the end, one of `numbered` before a digit,
    as in mask1, or the ending of an image file, as masks called a.jpg.png have it.
    """
    return re.compile(
        rf"^(?:{words})[-_. ]+|^(?:{numbered})(?=\d)|[-_. ]+(?:{words})$|"
        rf"(?:{_SUFFIXES})$",
        re.IGNORECASE,
    )


_MASK_AFFIX = _affixes(_MASK_WORDS, "masks?|labels?")
_IMAGE_AFFIX = _affixes(_IMAGE_WORDS, "images?|img")


@dataclasses.dataclass
class Layout:
    """The files of a user's folder.

    Attributes:
      images: id -> image.
      masks: id of the image -> its mask; the mask's own id where it has no image.
      read: names directly below the folder that are part of the layout.
      notes: what is right but may surprise, one line each.
      masks_folder: name of the folder of masks for messages; "" if there is none.
    """

    images: dict[str, pathlib.Path]
    masks: dict[str, pathlib.Path]
    read: set[str]
    notes: list[str]
    masks_folder: str = ""


def find(directory: pathlib.Path, problems: list[str]) -> Layout:
    """Finds images and masks; `problems` gets one line for each problem."""
    notes: list[str] = []
    image_roots = named_folders(directory, IMAGE_FOLDERS)
    mask_roots = [
        root
        for root in named_folders(directory, MASK_FOLDERS)
        if root[1].name.lower().startswith("mask") or _holds_images(root[1])
    ]
    roots = image_roots or [("", directory)]
    unlabeled = {path for _, path in named_folders(directory, UNLABELED_FOLDERS)}
    skipped = {path for _, path in mask_roots} | unlabeled
    images = _collect(roots, skipped, problems, notes if image_roots else [])
    masks = _collect(mask_roots, set(), problems, notes)
    if not mask_roots:
        images, masks = _side_by_side(images)
    for kind, found in ((image_roots, images), (mask_roots, masks)):
        if kind and not found:
            problems.append(f"{kind[0][1]}: holds no image file {IMAGE_SUFFIXES}")
    if mask_roots and not image_roots:
        report_absent(directory, Layout({}, masks, set(), []), problems)
    masks = _pair(images, masks, problems, notes)
    tops = {path.relative_to(directory).parts[0] for _, path in image_roots}
    tops |= {path.relative_to(directory).parts[0] for _, path in mask_roots}
    if not image_roots:
        tops |= {path.relative_to(directory).parts[0] for path in images.values()}
        tops |= {path.relative_to(directory).parts[0] for path in masks.values()}
    folder = mask_roots[0][1].name if mask_roots else ""
    return Layout(images, masks, tops, notes, folder)


def report_absent(directory: pathlib.Path, found: Layout, problems: list[str]) -> None:
    """Adds a problem for a missing folder of images or masks."""
    there = [path.name for path in files.visible(directory.iterdir())]
    for name, present in (("images", found.images), ("masks", found.masks)):
        if not present and not (directory / name).is_dir():
            path = directory / name
            problems.append(f"{path}: no such folder; beside it are {shorten(there)}")


def named_folders(
    directory: pathlib.Path, names: tuple[str, ...]
) -> list[tuple[str, pathlib.Path]]:
    """Returns the folders of these names with the prefix of their ids.

    They are directly below `directory`, else one level deeper.
    """
    below = [path for path in files.visible(directory.iterdir()) if path.is_dir()]
    direct = [path for path in below if path.name.lower() in names]
    if direct:
        return [("", min(direct, key=lambda path: names.index(path.name.lower())))]
    return [
        (f"{above.name}/", path)
        for above in below
        if above.name.lower() not in UNLABELED_FOLDERS
        for path in files.visible(above.iterdir())
        if path.is_dir() and path.name.lower() in names
    ]


def _holds_images(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds image files, and not annotations in text."""
    return bool(files.find(folder, IMAGE_SUFFIXES, []).read)


def collect(
    folder: pathlib.Path, problems: list[str], notes: list[str], prefix: str = ""
) -> dict[str, pathlib.Path]:
    """Finds the image files of a folder at any depth, by `prefix` and id."""
    below = files.find(folder, IMAGE_SUFFIXES, problems)
    notes += below.note(folder)
    found: dict[str, pathlib.Path] = {}
    for path in below.read:
        relative = path.relative_to(folder).with_suffix("").as_posix()
        key = composed(prefix + relative)
        if key in found:
            problems.append(f"{path}: {found[key].name} has the same id {key!r}")
        found[key] = path
    return found


def _collect(
    roots: list[tuple[str, pathlib.Path]],
    skipped: set[pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> dict[str, pathlib.Path]:
    found: dict[str, pathlib.Path] = {}
    for prefix, folder in roots:
        found |= collect(folder, problems, notes, prefix)
    return {
        key: path
        for key, path in found.items()
        if not any(path.is_relative_to(folder) for folder in skipped)
    }


def _side_by_side(
    found: dict[str, pathlib.Path],
) -> tuple[dict[str, pathlib.Path], dict[str, pathlib.Path]]:
    """Divides files of one folder into images and masks by their names."""
    images = {key for key in found if _of_mask(key) == key}
    known = images | {_of_image(key) for key in images}
    masks = {
        key
        for key in found
        if key not in images and not known.isdisjoint((_of_mask(key), _of_both(key)))
    }
    return (
        {key: path for key, path in found.items() if key not in masks},
        {key: path for key, path in found.items() if key in masks},
    )


def _bare(key: str, affix: re.Pattern[str]) -> str:
    """Returns an id whose file name has no such words at its ends."""
    folder, slash, name = key.rpartition("/")
    while (shorter := affix.sub("", name)) != name and shorter:
        name = shorter
    return folder + slash + name


def _of_image(key: str) -> str:
    return _bare(key, _IMAGE_AFFIX)


def _of_mask(key: str) -> str:
    return _bare(key, _MASK_AFFIX)


def _of_both(key: str) -> str:
    return _of_image(_of_mask(key))


def _file_name(key: str) -> str:
    return key.rpartition("/")[2]


def _of_channel(key: str) -> str:
    return key.removesuffix("_0000")


# How the ids of an image and of its mask are made equal, in this order: a mask may keep
# the image's words, as in IMG_0001_mask, replace them, or keep some of them. In nnU-Net
# the image is the channel 0 of its mask's name.
_WAYS = (
    (str, _of_mask),
    (_of_image, _of_mask),
    (_of_image, _of_both),
    (_of_channel, str),
)


def _pair(
    images: dict[str, pathlib.Path],
    masks: dict[str, pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> dict[str, pathlib.Path]:
    """Returns the masks by the id of their image."""
    paired = {key: path for key, path in masks.items() if key in images}
    rest = {key: path for key, path in masks.items() if key not in images}
    examples = []
    for place, (of_image, of_mask) in itertools.product((str, _file_name), _WAYS):
        left = [key for key in images if key not in paired]
        of_images = unique((place(of_image(key)), key) for key in left)
        of_masks = unique((place(of_mask(key)), key) for key in rest)
        for name in of_masks.keys() & of_images.keys():
            key = of_images[name]
            paired[key] = rest.pop(of_masks[name])
            examples.append((key, paired[key].name))
    if examples:
        key, mask = min(examples)
        notes.append(
            f"{quantity(len(examples), 'mask')} paired by the rest of the name, such "
            f"as {mask} with {images[key].name}"
        )
    taken = {_of_image(key): path for key, path in paired.items()} | paired
    for key, path in rest.items():
        other = taken.get(_of_mask(key))
        if other is not None:
            problems.append(f"{path}: {other.name} is a mask of the same image")
    _report_channels(images, paired, problems)
    return paired | rest


def _report_channels(
    images: dict[str, pathlib.Path],
    paired: dict[str, pathlib.Path],
    problems: list[str],
) -> None:
    """Adds a problem for channels in files of their own, which cannot be read."""
    for key, mask in paired.items():
        second = f"{_of_channel(key)}_0001"
        if (
            _file_name(key) == f"{mask.stem}_0000"
            and second in images.keys() - paired.keys()
        ):
            problems.append(
                f"{images[second]}: is it another channel of {images[key].name}, whose "
                f"mask is {mask.name}? Put all channels of an image into one .npy file "
                "(height, width, channels) or TIFF"
            )


def unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns name -> id for the names that one id has."""
    found = collections.defaultdict(list)
    for name, key in pairs:
        found[name].append(key)
    return {name: keys[0] for name, keys in found.items() if len(keys) == 1}
