"""Finds the images that a prediction reads: files, folders, lists."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

from mpmc_jax.data import files, lists
from mpmc_jax.data.stacks import NIFTI_SUFFIXES
from mpmc_jax.evaluation.prediction_files import is_prediction
from mpmc_jax.paths import as_path
from mpmc_jax.text import quantity, shorten

_SUFFIXES = (*lists.IMAGE_SUFFIXES, *NIFTI_SUFFIXES)
_LIST_SUFFIXES = (".txt", ".lst", ".list")


@dataclasses.dataclass
class Inputs:
    """The images that --input names.

    Attributes:
      outputs: image file -> path of its results below --output, without an ending.
      notes: lines about files that are skipped.
      problems: lines about files that cannot be read.
    """

    outputs: dict[pathlib.Path, pathlib.PurePath]
    notes: list[str]
    problems: list[str]


def find_images(inputs: Sequence[str]) -> Inputs:
    """Finds the images that --input names; in folders, files with an image's ending.

    Files that `PredictionWriter` wrote are left out, so that a second call with its
    output inside the input finds the same images again.

    Raises:
      FileNotFoundError: a path does not exist, or there is no image.
      ValueError: the pictures of two images would have the same name.
    """
    found = Inputs({}, [], [])
    for path in _paths(inputs):
        if path.is_dir():
            listing = files.find(path, _SUFFIXES, found.problems)
            found.notes += listing.note(path)
            for file in listing.read:
                found.outputs[file] = _stem(file.relative_to(path))
        elif path.suffix.lower() in _LIST_SUFFIXES:
            found.outputs |= _listed(path)
        else:
            found.outputs[path] = _stem(pathlib.PurePath(path.name))
    written = [path for path in found.outputs if is_prediction(path)]
    for path in written:
        del found.outputs[path]
    if written:
        count = quantity(len(written), "file")
        found.notes.append(f"not read: {count} of an earlier prediction")
    if not found.outputs:
        raise FileNotFoundError(
            f"--input={' '.join(inputs)} holds no image; known endings: "
            f"{', '.join(_SUFFIXES)}; {'; '.join(found.notes + found.problems)}"
        )
    counts = collections.Counter(found.outputs.values())
    duplicates = sorted(
        str(path) for path, output in found.outputs.items() if counts[output] > 1
    )
    if duplicates:
        raise ValueError(
            f"--input holds files whose results would have the same name: "
            f"{shorten(duplicates)}; rename them, or predict them into different "
            "--output folders"
        )
    return found


def _stem(path: pathlib.PurePath) -> pathlib.PurePath:
    """Removes an image's ending, such as .nii.gz."""
    lower = path.name.lower()
    ending = max(
        (x for x in _SUFFIXES if lower.endswith(x)), key=len, default=path.suffix
    )
    return path.with_name(path.name[: len(path.name) - len(ending)])


def _listed(path: pathlib.Path) -> dict[pathlib.Path, pathlib.PurePath]:
    """Reads a list of images, one path per line, relative to the list's folder.

    Results have the lines' folders below --output; those of a line that is absolute or
    has ".." have the file's name alone.
    """
    found = {}
    for line in map(pathlib.PurePath, lists.read_paths(path)):
        below = not line.is_absolute() and ".." not in line.parts
        found[path.parent / line] = _stem(
            line if below else pathlib.PurePath(line.name)
        )
    return found


def _paths(inputs: Sequence[str]) -> list[pathlib.Path]:
    """Splits --input into paths; a comma separates two unless a file's name has it.

    Raises:
      FileNotFoundError: a path does not exist.
    """
    paths = []
    for text in inputs:
        whole = as_path("--input", text)
        parts = [text] if whole.exists() else text.split(",")
        for path in (as_path("--input", part) for part in parts):
            if not path.exists():
                comma = (
                    "; files with a comma in their names are given as arguments of "
                    "their own: --input FILE FILE"
                )
                hint = comma if "," in text else ""
                raise FileNotFoundError(f"--input={path} does not exist{hint}")
            paths.append(path)
    return paths
