"""Segments images with a trained run.

python -m launch.predict --workdir=runs/camvid --input=DIR_OR_FILES --output=DIR

--input takes folders of images, with their subfolders, and files; several are separated
by blanks or commas. Every image NAME.* gives NAME_index.png (palette PNG whose values
are the classes), NAME_color.png and NAME_overlay.png, from the best checkpoint unless
--checkpoint names another. Subfolders are kept. What is there already stays, unless
--overwrite is given; it replaces pictures of this program and no other file.
"""

import collections
import dataclasses
import errno
import pathlib
import sys
from collections.abc import Sequence

from launch import cli
from mpmc_jax.data import files
from mpmc_jax.data.decode import decode_array
from mpmc_jax.data.lists import IMAGE_SUFFIXES, printable, shorten
from mpmc_jax.evaluation import pictures
from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path

# Errors of the disk, which every further image would meet.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclasses.dataclass
class Inputs:
    """What --input names.

    Attributes:
      results: image file -> path of its results below --output, without an ending.
      notes: lines about what is left out.
      problems: lines about what cannot be read.
    """

    results: dict[pathlib.Path, pathlib.PurePath]
    notes: list[str]
    problems: list[str]


def find_images(inputs: Sequence[str]) -> Inputs:
    """The images that --input names, of folders those with an image's ending.

    Pictures that this program wrote are left out: a second call with its output inside
    the input finds the same images again.

    Raises:
      FileNotFoundError: a path does not exist, or there is no image.
      ValueError: the results of two images would have the same name.
    """
    found = Inputs({}, [], [])
    for path in _paths(inputs):
        if path.is_dir():
            there = files.find(path, IMAGE_SUFFIXES, found.problems)
            found.notes += there.note(path)
            for file in there.read:
                found.results[file] = file.relative_to(path).with_suffix("")
        else:
            found.results[path] = pathlib.PurePath(path.stem)
    ours = [path for path in found.results if pictures.is_prediction(path)]
    for path in ours:
        del found.results[path]
    if ours:
        found.notes.append(f"not read: {len(ours)} pictures of an earlier prediction")
    if not found.results:
        raise FileNotFoundError(
            f"--input={' '.join(inputs)} holds no image; known endings: "
            f"{', '.join(IMAGE_SUFFIXES)}; {'; '.join(found.notes + found.problems)}"
        )
    counts = collections.Counter(found.results.values())
    twice = sorted(
        str(path) for path, name in found.results.items() if counts[name] > 1
    )
    if twice:
        raise ValueError(
            f"--input holds files whose results would have the same name: "
            f"{shorten(twice)}; rename them, or predict them into different --output "
            "folders"
        )
    return found


def _paths(inputs: Sequence[str]) -> list[pathlib.Path]:
    """The arguments' paths; a comma separates two unless a file's name holds it."""
    paths = []
    for text in inputs:
        whole = as_path("--input", text)
        parts = [text] if whole.exists() else text.split(",")
        for path in (as_path("--input", part) for part in parts):
            if not path.exists():
                raise FileNotFoundError(
                    f"--input={path} does not exist; files with a comma in their names "
                    "are given as arguments of their own: --input FILE FILE"
                )
            paths.append(path)
    return paths


class Writer:
    """Segments images and writes their pictures.

    Attributes:
      written: how many images were segmented.
      kept: how many had their pictures already.
      problems: one line for each image that could not be read or written.
    """

    def __init__(self, run: runs.Run, output: pathlib.Path, *, overwrite: bool):
        """Takes the run, the folder of results, and whether to replace what it has."""
        self._facts, self._output, self._overwrite = run.facts, output, overwrite
        self._predictor = Predictor(
            run.module, run.variables, run.facts.pixels, runs.make_protocol(run.config)
        )
        self.written = self.kept = 0
        self.problems: list[str] = []

    def predict(self, path: pathlib.Path, name: pathlib.PurePath) -> None:
        """Segments one image; what is wrong with it becomes a problem.

        Raises:
          OSError: no image can be written any more, as on a full disk.
        """
        try:
            self._predict(path, self._output / name)
        except OSError as error:
            if error.errno in _OF_THE_DISK:
                raise OSError(
                    f"{error.filename or path}: {error.strerror}; {self.written} "
                    "images were written, and the same command goes on with the others"
                ) from error
            self.problems.append(f"{path}: {error}")
        # Decoders fail in ways of their own, a network on sizes that it cannot take,
        # and memory on what is too large; other images have none of it.
        except Exception as error:
            lines = str(error).splitlines()
            self.problems.append(f"{path}: {lines[0] if lines else repr(error)}")

    def _predict(self, path: pathlib.Path, stem: pathlib.Path) -> None:
        if not path.is_file():
            raise ValueError("a pipe or device, no file")
        results = pictures.prediction_paths(stem)
        there = [each for each in results if each.exists() or each.is_symlink()]
        foreign = [each for each in there if not pictures.is_prediction(each)]
        if foreign:
            raise ValueError(
                f"its result would replace {foreign[0]}, which this program did not "
                "write; choose another --output"
            )
        # A call that was killed may have left one or two.
        if there == results and not self._overwrite:
            self.kept += 1
            return
        image = decode_array(path.read_bytes(), self._facts.pixels)
        # First: it refuses what is too large for this machine's memory.
        classes = self._predictor(image)
        shown = pictures.displayable(image, self._facts.pixels)
        stem.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_prediction(stem, classes, shown, self._facts.palette)
        self.written += 1


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("predict", __doc__)
    cli.add_run(parser)
    parser.add_argument(
        "--input", required=True, nargs="+", help="folders and files of images"
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results that are there"
    )
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        output = as_path("--output", args.output)
        workdir = as_path("--workdir", args.workdir)
        found = find_images(args.input)
        if output.is_file():
            raise ValueError(f"--output={output} is a file; name a folder")
        output.mkdir(parents=True, exist_ok=True)
        run = runs.open_run(workdir, args.checkpoint)
        writer = Writer(run, output, overwrite=args.overwrite)
        for path, name in found.results.items():
            writer.predict(path, name)
        total = len(found.results)
        mark = ", by a run on a partial data set" if run.facts.partial else ""
        lines = [
            *found.notes,
            f"{writer.written} of {total} images written to {output}{mark}",
        ]
        if writer.kept:
            lines.append(
                f"{writer.kept} of {total} have their results there already, which are "
                "kept; --overwrite replaces them"
            )
        print(*map(printable, lines), sep="\n")
        problems = found.problems + writer.problems
    if problems:
        sys.exit("\n".join(f"error: {printable(each)}" for each in problems))


if __name__ == "__main__":
    main()
