"""Segments image files and folders with a trained run, and writes pictures."""

import collections
import dataclasses
import errno
import pathlib
from collections.abc import Sequence

from mpmc_jax.data import files
from mpmc_jax.data.decode import decode_array
from mpmc_jax.data.lists import IMAGE_SUFFIXES
from mpmc_jax.evaluation import pictures
from mpmc_jax.experiments.run import Run
from mpmc_jax.paths import as_path
from mpmc_jax.text import quantity, shorten

# Errors of the disk, which every further image would cause again.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclasses.dataclass
class Inputs:
    """The images that --input names.

    Attributes:
      outputs: image file -> path of its pictures below --output, without an ending.
      notes: lines about files that are skipped.
      problems: lines about files that cannot be read.
    """

    outputs: dict[pathlib.Path, pathlib.PurePath]
    notes: list[str]
    problems: list[str]


def find_images(inputs: Sequence[str]) -> Inputs:
    """Finds the images that --input names; in folders, files with an image's ending.

    Pictures that `PredictionWriter` wrote are left out, so that a second call with its
    output inside the input finds the same images again.

    Raises:
      FileNotFoundError: a path does not exist, or there is no image.
      ValueError: the pictures of two images would have the same name.
    """
    found = Inputs({}, [], [])
    for path in _paths(inputs):
        if path.is_dir():
            listing = files.find(path, IMAGE_SUFFIXES, found.problems)
            found.notes += listing.note(path)
            for file in listing.read:
                found.outputs[file] = file.relative_to(path).with_suffix("")
        else:
            found.outputs[path] = pathlib.PurePath(path.stem)
    written = [path for path in found.outputs if pictures.is_prediction(path)]
    for path in written:
        del found.outputs[path]
    if written:
        count = quantity(len(written), "picture")
        found.notes.append(f"not read: {count} of an earlier prediction")
    if not found.outputs:
        raise FileNotFoundError(
            f"--input={' '.join(inputs)} holds no image; known endings: "
            f"{', '.join(IMAGE_SUFFIXES)}; {'; '.join(found.notes + found.problems)}"
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


class PredictionWriter:
    """Segments image files and writes their pictures.

    Attributes:
      written: how many images were segmented.
      kept: how many had their pictures already.
      problems: one line for each image that could not be read or written.
    """

    def __init__(self, run: Run, output: pathlib.Path, *, overwrite: bool):
        """Takes the run, the output folder, and whether to replace its pictures."""
        self._run, self._output, self._overwrite = run, output, overwrite
        self.written = self.kept = 0
        self.problems: list[str] = []

    def predict(self, path: pathlib.Path, name: pathlib.PurePath) -> None:
        """Segments one image; an image that cannot be segmented becomes a problem.

        Raises:
          OSError: no further image could be written, as on a full disk.
        """
        try:
            self._predict(path, self._output / name)
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise OSError(
                    f"{error.filename or path}: {error.strerror}; "
                    f"{quantity(self.written, 'image')} written; run the same command "
                    "again for the others"
                ) from error
            self.problems.append(f"{path}: {error}")
        # Decoders raise errors of their own, a network fails on sizes that it cannot
        # take, and memory on images that are too large; the next image may succeed.
        except Exception as error:
            lines = str(error).splitlines()
            self.problems.append(f"{path}: {lines[0] if lines else repr(error)}")

    def _predict(self, path: pathlib.Path, stem: pathlib.Path) -> None:
        if not path.is_file():
            raise ValueError("a pipe or device, no file")
        outputs = pictures.prediction_paths(stem)
        existing = [each for each in outputs if each.exists() or each.is_symlink()]
        foreign = [each for each in existing if not pictures.is_prediction(each)]
        if foreign:
            raise ValueError(
                f"its result would replace {foreign[0]}, which this program did not "
                "write; choose another --output"
            )
        # A call that was killed may have written only some of the pictures.
        if existing == outputs and not self._overwrite:
            self.kept += 1
            return
        facts = self._run.facts
        image = decode_array(path.read_bytes(), facts.pixels)
        # First: it refuses images that are too large for the machine's memory.
        classes = self._run.predict(image)
        shown = pictures.displayable(image, facts.pixels)
        stem.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_prediction(stem, classes, shown, facts.palette)
        self.written += 1
