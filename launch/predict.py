"""Segments images with a trained run.

python -m launch.predict --workdir=runs/camvid --input=DIR_OR_FILES --output=DIR

--input is a folder of images, or files separated by commas. Every image NAME.* gives
NAME_index.png (palette PNG whose values are the classes), NAME_color.png and
NAME_overlay.png, from the best checkpoint unless --checkpoint names another.
"""

import collections
import pathlib
import sys
from collections.abc import Sequence

from launch import cli, runs
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.images import decode_array
from mpmc_jax.data.lists import IMAGE_SUFFIXES
from mpmc_jax.evaluation.pictures import displayable, write_prediction
from mpmc_jax.evaluation.predict import Predictor


def find_images(inputs: Sequence[str]) -> list[pathlib.Path]:
    """The image files that --input names; of folders, those with an image's suffix.

    Raises:
      FileNotFoundError: a path does not exist, or a folder holds no image.
      ValueError: two files have the same stem, so that one result would replace the
        other.
    """
    files = []
    for path in (cli.as_path("--input", each) for each in inputs):
        if not path.exists():
            raise FileNotFoundError(f"--input={path} does not exist")
        files += _images_in(path) if path.is_dir() else [path]
    stems = collections.Counter(path.stem for path in files)
    twice = sorted(str(path) for path in files if stems[path.stem] > 1)
    if twice:
        raise ValueError(
            f"--input holds files whose results would have the same name: {twice}; "
            "rename them, or predict them into different --output folders"
        )
    return files


def _images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not files:
        raise FileNotFoundError(
            f"--input={folder} holds no image; known suffixes: {list(IMAGE_SUFFIXES)}"
        )
    return files


def predict(
    run: runs.Run, files: Sequence[pathlib.Path], output: pathlib.Path
) -> list[str]:
    """Segments every file it can read.

    Returns:
      One line for each file that could not be read.
    """
    pixels = run.facts.pixels
    protocol = runs.make_protocol(run.config)
    predictor = Predictor(run.module, run.variables, pixels, protocol)
    problems = []
    for path in files:
        try:
            image = decode_array(path.read_bytes(), pixels)
        except (UnreadableImage, OSError) as error:
            problems.append(f"{path}: {error}")
            continue
        shown = displayable(image, pixels)
        write_prediction(output / path.stem, predictor(image), shown, run.facts.palette)
    return problems


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("predict", __doc__)
    cli.add_run(parser)
    parser.add_argument(
        "--input", required=True, help="a folder, or files separated by commas"
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    args = parser.parse_args(arguments)
    cli.settle()
    with cli.user_errors():
        output = cli.as_path("--output", args.output)
        workdir = cli.as_path("--workdir", args.workdir)
        files = find_images(args.input.split(","))
        if output.is_file():
            raise ValueError(f"--output={output} is a file; name a folder")
        output.mkdir(parents=True, exist_ok=True)
        run = runs.open_run(workdir, args.checkpoint)
        problems = predict(run, files, output)
    mark = ", by a run on a partial data set" if run.facts.partial else ""
    done = len(files) - len(problems)
    print(f"{done} of {len(files)} images written to {output}{mark}")
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
