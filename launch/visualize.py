"""Draws image, truth, prediction and lambda_s of a run's validation images.

python -m launch.visualize --workdir=runs/quickstart --output=figure.png [--images=4]

lambda_s weighs the prediction at every pixel as it would weigh a pseudo-label (eq. 5).
Its gray levels run from the image's smallest to its largest value, so compare them only
within one image. An SVG file and the numbers as CSV are written beside the PNG file.
"""

from launch import cli
from mpmc_jax.analysis.base import SavedRun
from mpmc_jax.analysis.panels import Panels
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
        output = as_path("--output", args.output)
        if output.suffix != ".png":
            raise ValueError(f"--output={output}: name a .png")
        workdir = as_path("--workdir", args.workdir)
        run = SavedRun(workdir, args.checkpoint, args.data_dir)
        drawing = Panels(args.images).draw([run])
        drawing.write(output.with_suffix(""))
        mark = ", of a partial data set" if run.restored.facts.partial else ""
        few = f", {quantity(len(drawing.rows), 'image')} of one size" * (
            len(drawing.rows) < args.images
        )
        print(printable(f"figure: {output}{few}{mark}"))


if __name__ == "__main__":
    main()
