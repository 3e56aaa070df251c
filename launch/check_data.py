"""Finds what is wrong with a data set before training, and counts its labels.

    python -m launch.check_data --dataset=folder --source=DIR [--classes=road,car]

Prints one line for every problem and exits with 1 if there is any.
"""

import sys

from absl import app, flags

from launch import source_flags
from mpmc_jax.data import check


def main(argv: list[str]) -> None:
    """Checks the data set that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        source = source_flags.read_source()
    except FileNotFoundError as error:
        sys.exit(f"ERROR: {error}")
    report = check.check_source(source)
    print(check.summary(source))
    print(report.table(source.class_names))
    if report.problems:
        sys.exit(check.failure(report))
    print("No problem found.")


if __name__ == "__main__":
    flags.mark_flag_as_required("dataset")
    app.run(main)
