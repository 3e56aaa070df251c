"""Segments images with a trained run.

python -m launch.predict --workdir=runs/camvid --input=DIR_OR_FILES --output=DIR

--input takes folders of images, with their subfolders, and files, separated by blanks
or commas. Every image NAME.* gives NAME_index.png (a palette PNG whose values are the
classes), NAME_color.png and NAME_overlay.png, from the best checkpoint unless
--checkpoint names another. Subfolders are kept. Existing results stay unless
--overwrite is given, which replaces pictures of this program and no other file.
"""

import sys

from launch import cli
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.predict import PredictionWriter, find_images
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("predict", __doc__)
    cli.add_run(parser)
    parser.add_argument(
        "--input", required=True, nargs="+", help="folders and files of images"
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing results"
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
        run = runs.load_run(workdir, args.checkpoint)
        writer = PredictionWriter(run, output, overwrite=args.overwrite)
        for path, name in found.outputs.items():
            writer.predict(path, name)
        total = quantity(len(found.outputs), "image")
        partial = ", by a run on a partial data set" if run.facts.partial else ""
        lines = [
            *found.notes,
            f"{writer.written} of {total} written to {output}{partial}",
        ]
        if writer.kept:
            lines.append(
                f"{writer.kept} of {total} already done; --overwrite replaces existing "
                "results"
            )
        print(*map(printable, lines), sep="\n")
        problems = found.problems + writer.problems
    if problems:
        sys.exit("\n".join(f"error: {printable(each)}" for each in problems))


if __name__ == "__main__":
    main()
