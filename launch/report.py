"""Compares trained runs on one page of HTML.

python -m launch.report runs/a runs/b --output=report.html

The page holds learning curves, IoU by class, confusion matrices, reliability, predicted
images, the settings in which the runs differ, and their environments. It is one file,
which needs no network and no other file. All runs are of one data set, whose validation
images are read once per run and figure.
"""

from launch import cli
from mpmc_jax.analysis import report
from mpmc_jax.atomic_write import write_text
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--output", required=True, help="an .html file")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument(
        "--images", type=int, default=3, help="images shown; 0 for none"
    )
    cli.add_data_dir(parser)
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        output = as_path("--output", args.output)
        if output.suffix != ".html":
            raise ValueError(f"--output={output}: name an .html file")
        if args.images < 0:
            raise ValueError(f"--images={args.images}: 0 or more are shown")
        content = report.render(
            args.runs,
            checkpoint=args.checkpoint,
            data_dir=args.data_dir,
            images=args.images,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, content)
        print(printable(f"written to {output}"))


if __name__ == "__main__":
    main()
