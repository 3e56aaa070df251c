"""Draws image, truth, prediction and lambda_s of a run's validation images.

python -m launch.visualize --workdir=runs/quickstart --output=figure.png [--images=4]

lambda_s weighs the prediction at every pixel as it would weigh a pseudo-label (eq. 5).
Its gray levels run from the image's smallest to its largest value, so compare them only
within one image.
"""

import jax.numpy as jnp
import numpy as np

from launch import cli
from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.evaluation.pictures import (
    as_png,
    colorize,
    displayable,
    heat_map,
    panel,
)
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity

CAPTIONS = ("image", "truth", "prediction", "lambda_s of the prediction")


def rows(run: runs.Run, count: int) -> list[list[np.ndarray]]:
    """Pictures of the first `count` validation images of one size.

    Raises:
      ValueError: the run has no patch classifier.
    """
    weigh = runs.lambda_s_function(run)
    source = runs.open_split(run, "val")
    chosen = [i for i in range(len(source)) if source.size(i) == source.size(0)]
    pictures = []
    for number in chosen[:count]:
        example = source[number]
        pseudo, weight = weigh(
            jnp.asarray(example.image[None]), jnp.asarray(example.label[None])
        )
        pictures.append(
            [
                displayable(example.image, run.facts.pixels),
                colorize(example.label, run.facts.palette),
                colorize(np.asarray(pseudo[0]), run.facts.palette),
                heat_map(np.asarray(weight[0])),
            ]
        )
    return pictures


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("visualize", __doc__)
    cli.add_run(parser)
    cli.add_data_dir(parser)
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument("--images", type=int, default=4, help="rows of the figure")
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        if args.images < 1:
            raise ValueError(f"--images={args.images}: at least 1 is needed")
        output = as_path("--output", args.output)
        if output.suffix.lower() != ".png":
            raise ValueError(f"--output={output}: name a .png")
        run = runs.load_run(as_path("--workdir", args.workdir), args.checkpoint)
        run = runs.use_data(run, args.data_dir)
        pictures = rows(run, args.images)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, as_png(panel(pictures, CAPTIONS)))
        mark = ", of a partial data set" if run.facts.partial else ""
        few = f", {quantity(len(pictures), 'image')} of one size" * (
            len(pictures) < args.images
        )
        print(printable(f"figure: {output}{few}{mark}"))


if __name__ == "__main__":
    main()
