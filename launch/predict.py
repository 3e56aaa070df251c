r"""Segments images with a trained run.

python -m launch.predict --workdir=runs/camvid --input=DIR_OR_FILES --output=DIR \
    [--outputs=index,color,overlay,entropy,probabilities,patches] \
    [--scales=0.5,1,1.5] [--flip] [--pad_to=N] [--window_above=PIXELS]

--input takes folders of images, with their subfolders, files, and lists of files
(.txt, one path per line, relative to the list), separated by blanks or commas. Every
image NAME.* gives, from the best checkpoint unless --checkpoint names another:

    NAME_index.png            a palette PNG whose values are the classes
    NAME_color.png            the classes' colors
    NAME_overlay.png          the colors over the image
    NAME_entropy.png          white where all classes are equally likely
    NAME_probabilities.npz    "probabilities" (h,w,classes), half precision
    NAME_patches.npz          "probabilities" of the classes in each patch (with MPMC),
                              and the "rows" and "columns" that patches cover

The first three are written unless --outputs names others. Index and probabilities of a
GeoTIFF are GeoTIFF too. NIfTI volumes and TIFF files of several pages give a folder
NAME/ with the results of each slice; the index of NIfTI is NAME_index.nii.gz.
Subfolders are kept. Existing results stay unless --overwrite is given, which replaces
files of this program and no others.

Images of more than --window_above pixels are predicted in overlapping windows. Each
size of image is compiled once; --pad_to=N pads images to multiples of N, so that fewer
sizes are compiled, and changes results slightly.
"""

import argparse
import sys

from launch import cli
from mpmc_jax.data.parallel_map import with_progress
from mpmc_jax.evaluation.predict import WINDOW_ABOVE
from mpmc_jax.evaluation.prediction_files import PICTURES
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.predict import PredictionWriter
from mpmc_jax.experiments.predict_inputs import find_images
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("predict", __doc__)
    cli.add_run(parser)
    parser.add_argument(
        "--input", required=True, nargs="+", help="folders, files and lists of images"
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument(
        "--outputs", default=",".join(PICTURES), help="what to write per image"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing results"
    )
    parser.add_argument("--scales", default="", help="factors, separated by commas")
    parser.add_argument("--flip", action="store_true", help="average mirrored images")
    parser.add_argument("--pad_to", type=int, default=0, help="0 is exact")
    parser.add_argument(
        "--window_above",
        type=int,
        default=WINDOW_ABOVE,
        metavar="PIXELS",
        help="largest image that is not predicted in windows",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    args = _parser().parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        output = as_path("--output", args.output)
        workdir = as_path("--workdir", args.workdir)
        found = find_images(args.input)
        if output.is_file():
            raise ValueError(f"--output={output} is a file; name a folder")
        output.mkdir(parents=True, exist_ok=True)
        run = runs.with_protocol(
            runs.load_run(workdir, args.checkpoint),
            scales=cli.parse_scales(args.scales),
            flip=args.flip,
            pad_to=args.pad_to,
        )
        writer = PredictionWriter(
            run,
            output,
            overwrite=args.overwrite,
            kinds=args.outputs.split(","),
            window_above=args.window_above,
        )
        number = len(found.outputs)
        for _ in with_progress(writer.predict(found.outputs), number, "predicting"):
            pass
        total = quantity(number, "image")
        partial = ", by a run on a partial data set" if run.facts.partial else ""
        failed = writer.problems(found.outputs)
        done = f"{writer.written} of {total} written to {output}{partial}"
        if writer.kept:
            done += f", {writer.kept} already there (--overwrite replaces them)"
        if failed:
            done += f", {len(failed)} failed"
        print(*map(printable, [*found.notes, done]), sep="\n")
        problems = found.problems + failed
    if problems:
        sys.exit("\n".join(f"error: {printable(each)}" for each in problems))


if __name__ == "__main__":
    main()
