"""Draws image, truth, prediction and lambda_s of a run's validation images.

python -m launch.figure --workdir=runs/quickstart --output=figure.png [--images=4]

lambda_s weighs the prediction at every pixel as it would as a pseudo-label (eq. 5);
the grey runs from the image's least to its largest value, so only images' own pixels
compare.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from launch import runs
from launch.cache import keep_compiled_programs
from mpmc_jax.data.build import build_eval
from mpmc_jax.evaluation.pictures import colorize, heat_map, panel
from mpmc_jax.training.checkpoint import CheckpointError
from mpmc_jax.training.workdir import WorkdirError

CAPTIONS = ("image", "truth", "prediction", "lambda_s of the prediction")


def rows(run: runs.Run, count: int) -> list[list[np.ndarray]]:
    """Pictures of the first `count` validation images of one size.

    Raises:
      ValueError: the run has no patch classifier.
    """
    trust = runs.trust_function(run)
    source = build_eval(run.config, "val")
    chosen = [i for i in range(len(source)) if source.size(i) == source.size(0)]
    pictures = []
    for number in chosen[:count]:
        example = source[number]
        pseudo, weight = trust(
            jnp.asarray(example.image[None]), jnp.asarray(example.label[None])
        )
        pictures.append(
            [
                example.image,
                colorize(example.label, run.info.palette),
                colorize(np.asarray(pseudo[0]), run.info.palette),
                heat_map(np.asarray(weight[0])),
            ]
        )
    return pictures


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.figure", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument("--images", type=int, default=4, help="rows of the figure")
    args = parser.parse_args(arguments)
    keep_compiled_programs()
    try:
        run = runs.open_run(args.workdir)
        figure = panel(rows(run, args.images), CAPTIONS)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        figure.save(args.output)
    except (ValueError, OSError, CheckpointError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()
