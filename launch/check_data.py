"""Finds what is wrong with a data set before training, and counts its labels.

    python -m launch.check_data --dataset=folder --source=DIR [--classes=road,car]

Prints one line for every problem and exits with 1 if there is any.
"""

from launch import cli
from mpmc_jax.data import check


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("check_data", __doc__)
    cli.add_source(parser)
    args = parser.parse_args(arguments)
    with cli.user_errors():
        source = cli.read_source(args)
        report = check.check_source(source)
        print(check.summary(source))
        if source.class_names:
            print(report.table(source.class_names))
        if report.problems:
            raise ValueError(check.failure(report))
    print("No problem found.")


if __name__ == "__main__":
    main()
