"""CamVid road scenes in SegNet's 11-class version (Brostow et al., 2009).

    SOURCE/train.txt, val.txt    "image label" on each line
    SOURCE/test.txt              optional, likewise

Paths are relative to SOURCE. In the published lists they begin with /SegNet/CamVid/; if
files are found without leading folders, the same number of them is left out of every
path, and a note says so. An id is the stem of the image's file; if images in several
folders have the same stem, all ids are paths. Label 11 is void in the published masks,
and becomes 255.
"""

import pathlib
import unicodedata

from mpmc_jax.data import lists
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import RGB
from mpmc_jax.text import shorten

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


# SegNet's masks hold 11 for void.
_MASKS = MaskFormat(void=(len(CLASSES),))

# The path of an image in its list, and the files of image and mask.
Row = tuple[pathlib.PurePosixPath, pathlib.Path, pathlib.Path]


def read_source(directory: pathlib.Path) -> Source:
    """Describes the CamVid folder `directory`; `.problems` lists what is wrong."""
    problems: list[str] = []
    notes: list[str] = []
    names = ["train", "val"]
    if (directory / "test.txt").is_file():
        names.append("test")
    rows = {
        split: _read_list(directory, f"{split}.txt", problems, notes) for split in names
    }
    paths = {path for part in rows.values() for path, _, _ in part}
    stems_differ = len({path.stem for path in paths}) == len(paths)
    splits: dict[str, tuple[Sample, ...]] = {}
    for split, part in rows.items():
        samples = [
            Sample(_id(path, short=stems_differ), image, mask)
            for path, image, mask in part
        ]
        ids = [sample.id for sample in samples]
        if again := lists.repeated(ids):
            problems.append(f"{directory / split}.txt: repeats {shorten(again)}")
        for other, earlier in splits.items():
            if both := sorted({sample.id for sample in earlier} & set(ids)):
                problems.append(f"{other}.txt and {split}.txt share {shorten(both)}")
        splits[split] = tuple(samples)
    return Source(
        name="camvid",
        class_names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        pixels=RGB,
        splits=splits,
        masks=_MASKS,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _id(path: pathlib.PurePosixPath, *, short: bool) -> str:
    return path.stem if short else str(path.with_suffix(""))


def _read_list(
    directory: pathlib.Path, name: str, problems: list[str], notes: list[str]
) -> list[Row]:
    """Reads the pairs of a list whose files exist; the others are problems."""
    path = directory / name
    try:
        lines = lists.read_lines(path)
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
        return []
    if not lines:
        problems.append(f"{path}: empty list")
    pairs = []
    for line in lines:
        files = line.split()
        if len(files) == 2:
            pairs.append((pathlib.PurePosixPath(files[0]), files[1]))
        else:
            problems.append(f"{path}: not an image and a mask: {line!r}")
    left_out = _leading_folders(directory, [image for image, _ in pairs])
    if left_out:
        notes.append(
            f"{path}: leading folders are left out of all paths; {pairs[0][0]} becomes "
            f"{directory / _without(pairs[0][0], left_out)}"
        )
    rows, absent = [], []
    for image, mask in pairs:
        row = (
            _without(image, left_out),
            _file(directory, _without(image, left_out)),
            _file(directory, _without(pathlib.PurePosixPath(mask), left_out)),
        )
        missing = [str(file) for file in row[1:] if not file.is_file()]
        absent += missing
        if not missing:
            rows.append(row)
    if absent:
        problems.append(f"{path}: names absent files: {shorten(absent)}")
    return rows


def _leading_folders(
    directory: pathlib.Path, paths: list[pathlib.PurePosixPath]
) -> int:
    """Returns how many leading folders to leave out so that most paths are files."""
    deepest = max((len(path.parts) for path in paths), default=1)
    return max(
        range(deepest),
        key=lambda number: sum(
            _file(directory, _without(path, number)).is_file() for path in paths
        ),
    )


def _without(path: pathlib.PurePosixPath, number: int) -> pathlib.PurePosixPath:
    """Returns a path without its first parts; "/" is the first of an absolute path."""
    return pathlib.PurePosixPath(*path.parts[number:])


def _file(directory: pathlib.Path, path: pathlib.PurePosixPath) -> pathlib.Path:
    """Returns the file of a path, in the Unicode form that the file system uses."""
    forms = [
        directory / unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD")
    ]
    return next((file for file in forms if file.is_file()), forms[0])
