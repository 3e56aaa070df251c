"""Finds problems of a data set before training, and counts its labels.

    python -m launch.check_data --dataset=folder --source=DIR [--classes=road,car]
    python -m launch.check_data --dataset=folder --data_dir=DIR        once prepared

Prints one line for every problem and exits with 1 if there is any.
"""

from launch import cli
from mpmc_jax.data import check, verify
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.paths import as_path


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("check_data", __doc__)
    cli.add_source(parser)
    parser.add_argument(
        "--data_dir",
        default="",
        help="check a prepared data set, not a source",
    )
    args = parser.parse_args(arguments)
    with cli.user_errors():
        if args.data_dir and args.source:
            raise ValueError("--source and --data_dir: give one, the data to check")
        if args.data_dir and args.classes:
            raise ValueError("--classes: a prepared data set has class names already")
        if args.data_dir:
            data_dir = as_path("--data_dir", args.data_dir)
            info = open_dataset(str(data_dir), args.dataset)
            report = verify.check(info)
            names = info.facts.class_names
            summary = verify.summary(info)
        else:
            source = cli.read_source(args, cli.class_names(args))
            report = check.check_source(source)
            names = source.class_names
            summary = check.summary(source)
        # Where no mask could be read, only the problems are worth a line.
        if report.images.any() or not report.problems:
            print(f"{summary}\n{report.table(names)}")
        if report.problems:
            raise ValueError(check.failure(report))
        print("No problem found.")


if __name__ == "__main__":
    main()
