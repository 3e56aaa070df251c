"""Pascal VOC 2012 (Everingham et al., 2010), with SBD (Hariharan et al., 2011).

    VOC2012/JPEGImages/ID.jpg
    VOC2012/SegmentationClass/ID.png    palette PNG: class indices, 255 for void
    VOC2012/ImageSets/Segmentation/     train.txt, val.txt; or train_aug.txt beside them

SOURCE is VOC2012 itself, VOCdevkit, or the folder of VOCdevkit. SBD is inside or beside
it, as the first of these that exists:

    SegmentationClassAug/ID.png         already converted
    benchmark_RELEASE/dataset/cls/ID.mat
    benchmark.tgz                       read without being extracted

Training images are those of VOC's train list and of SBD without VOC's val list (10582),
or without SBD the train list alone (1464). VOC's own masks take precedence over SBD's.
"""

import pathlib

from mpmc_jax.data import files, lists
from mpmc_jax.data.builders import archives
from mpmc_jax.data.decode import Color
from mpmc_jax.data.source import Blob, Derived, Sample, Source
from mpmc_jax.pixels import RGB
from mpmc_jax.text import shorten

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
EXPECTED = {"train": 10582, "val": 1449}
EXPECTED_WITHOUT_SBD = {"train": 1464, "val": 1449}
_PLACES = ("", "VOC2012", "VOCdevkit/VOC2012")
_LISTS = "ImageSets/Segmentation"


def palette() -> tuple[Color, ...]:
    """Returns VOC's colors.

    Bits 3i, 3i + 1 and 3i + 2 of the index are bit 7 - i of red, green and blue.
    """

    def channel(label: int, bit: int) -> int:
        return sum((label >> 3 * i + bit & 1) << 7 - i for i in range(3))

    return tuple(
        (channel(label, 0), channel(label, 1), channel(label, 2))
        for label in range(len(CLASSES))
    )


def read_source(directory: pathlib.Path) -> Source:
    """Describes VOC 2012 in or below `directory`; `.problems` lists what is wrong."""
    problems: list[str] = []
    root = _find_root(directory)
    splits: dict[str, tuple[Sample, ...]] = {"train": (), "val": ()}
    notes: list[str] = []
    expected = EXPECTED
    if root is None:
        problems.append(_no_root(directory))
    else:
        sbd, where = _find_sbd(root, problems)
        val = _read_list(root, directory, "val.txt", problems)
        train = _read_list(root, directory, "train_aug.txt", problems)
        if train is None:
            listed = _read_list(root, directory, "train.txt", problems)
            train = sorted({*(listed or ()), *sbd} - {*(val or ())})
            if not sbd and listed is not None:
                expected = EXPECTED_WITHOUT_SBD
                notes.append(
                    f"{root}: no SBD (SegmentationClassAug, benchmark_RELEASE or "
                    "benchmark.tgz); the splits of 10582 images need it"
                )
        if where:
            notes.append(f"{where}: masks of the images without a mask in VOC")
        named = "train.txt or train_aug.txt"
        splits = {
            "train": _samples(root, train, sbd, named, problems),
            "val": _samples(root, val or [], sbd, "val.txt", problems),
        }
        both = sorted({s.id for s in splits["train"]} & {s.id for s in splits["val"]})
        if both:
            problems.append(
                f"{root}: both for training and in val.txt: {shorten(both)}"
            )
    return Source(
        name="voc",
        class_names=CLASSES,
        palette=palette(),
        pixels=RGB,
        splits=splits,
        problems=tuple(problems),
        notes=tuple(notes),
        expected=expected,
    )


def _find_root(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of JPEGImages."""
    roots = [directory / place for place in _PLACES]
    return next((root for root in roots if (root / "JPEGImages").is_dir()), None)


def _no_root(directory: pathlib.Path) -> str:
    text = f"{directory}: no JPEGImages here, in VOC2012/ or in VOCdevkit/VOC2012/"
    _, where = _find_sbd(directory, [])
    if where:
        return (
            f"{text}, but SBD in {where}: SBD's masks need the images and lists of "
            "VOC 2012; extract VOCtrainval_11-May-2012.tar beside it"
        )
    return f"{text}; extract VOCtrainval_11-May-2012.tar there"


def _find_sbd(
    root: pathlib.Path, problems: list[str]
) -> tuple[dict[str, Blob], pathlib.Path | None]:
    """Returns SBD's masks by id and where they are; ({}, None) without SBD."""
    places = [root, root.absolute().parent]
    if places[1].name == "VOCdevkit":
        places.append(places[1].parent)
    for place in places:
        folder = place / "SegmentationClassAug"
        if folder.is_dir():
            masks: dict[str, Blob] = {**files.by_stem(folder, ".png")}
            return masks, folder
    for place in places:
        folder = place / "benchmark_RELEASE" / "dataset" / "cls"
        if folder.is_dir():
            return {
                key: Derived(path, str(path), archives.sbd_mask)
                for key, path in files.by_stem(folder, ".mat").items()
            }, folder
    for place in places:
        archive = place / "benchmark.tgz"
        if archive.is_file():
            return _read_archive(archive, problems), archive
    return {}, None


def _read_archive(archive: pathlib.Path, problems: list[str]) -> dict[str, Blob]:
    try:
        members = archives.read_members(archive, "dataset/cls", ".mat")
    except ValueError as error:
        problems.append(str(error))
        return {}
    if not members:
        problems.append(f"{archive}: holds no dataset/cls/*.mat; is it SBD's?")
    return {
        key: Derived(content, f"{archive}: {key}.mat", archives.sbd_mask)
        for key, content in members.items()
    }


def _read_list(
    root: pathlib.Path, directory: pathlib.Path, name: str, problems: list[str]
) -> list[str] | None:
    """Reads the ids of a list, or returns None if there is none.

    The list is in its published folder or beside it. All but train_aug.txt must exist.
    """
    places = [root / _LISTS / name, root / name, directory / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if name != "train_aug.txt":
            problems.append(f"{places[0]}: no such id list; extract the archive again")
        return None
    try:
        lines = lists.read_lines(path)
    except ValueError as error:
        problems.append(str(error))
        return []
    ids = [pathlib.PurePosixPath(line.split()[0]).stem for line in lines]
    if not ids:
        problems.append(f"{path}: empty list")
    return sorted(lists.unique(ids, path, problems))


def _samples(
    root: pathlib.Path,
    ids: list[str],
    sbd: dict[str, Blob],
    name: str,
    problems: list[str],
) -> tuple[Sample, ...]:
    """Returns the listed images whose files exist; the others are problems."""
    images = files.by_stem(root / "JPEGImages", ".jpg")
    own = files.by_stem(root / "SegmentationClass", ".png")
    masks = {**sbd, **own}
    for part, found, folder in (
        ("image", images, "JPEGImages"),
        ("mask", masks, "SegmentationClass or SBD"),
    ):
        absent = [key for key in ids if key not in found]
        if absent:
            hint = "extract the archive again"
            if len(absent) == len(ids):
                hint = "is it the list of another data set?"
            problems.append(
                f"{root}: {name} names {len(absent)} of {len(ids)} without {part} in "
                f"{folder}: {shorten(absent)}; {hint}"
            )
    return tuple(
        Sample(key, images[key], masks[key])
        for key in ids
        if key in images and key in masks
    )
