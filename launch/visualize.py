"""Draws image, truth, prediction and lambda_s of a run's validation images.

python -m launch.visualize --workdir=runs/quickstart --output=figure.png [--images=4]

lambda_s weighs the prediction at every pixel as it would weigh a pseudo-label (eq. 5).
Its gray levels run from the image's smallest to its largest value, so compare them only
within one image.
"""

from launch import cli
from mpmc_jax.analysis.panels import CAPTIONS, panel_rows
from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.evaluation.pictures import (
    as_png,
    panel,
)
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity


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
        pictures = panel_rows(run, args.images)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, as_png(panel(pictures, CAPTIONS)))
        mark = ", of a partial data set" if run.facts.partial else ""
        few = f", {quantity(len(pictures), 'image')} of one size" * (
            len(pictures) < args.images
        )
        print(printable(f"figure: {output}{few}{mark}"))


if __name__ == "__main__":
    main()
