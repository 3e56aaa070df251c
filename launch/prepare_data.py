"""Checks a data set and writes it in the form that training reads.

    python -m launch.prepare_data --dataset=NAME --source=DIR --data_dir=DIR

A second call does nothing if the source is the same, and fails if it is not.
"""

import sys

from absl import app, flags

from launch import source_flags
from mpmc_jax.data import build, check
from mpmc_jax.data.info import open_dataset

_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets lie.")


def main(argv: list[str]) -> None:
    """Prepares the data set that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    data_dir = _DATA_DIR.value
    try:
        source = source_flags.read_source()
        if build.is_prepared(data_dir, source.name):
            directory = open_dataset(data_dir, source.name).directory
            if build.has_changed(source, data_dir):
                sys.exit(
                    f"ERROR: {directory} was made from other data: the source HAS "
                    "CHANGED since, or is another. Remove that folder and run again, "
                    "or give another --data_dir"
                )
            print(f"Already prepared in {directory}; the source has not changed.")
            return
        report = check.check_source(source)
        if report.problems:
            sys.exit(check.failure(report))
        directory = build.prepare(source, report.present, data_dir)
    except OSError as error:
        sys.exit(f"ERROR: {error}")
    print(check.summary(source))
    print(f"Prepared in {directory}")


if __name__ == "__main__":
    flags.mark_flag_as_required("dataset")
    app.run(main)
