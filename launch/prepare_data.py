"""Checks a data set and writes it as the records that training reads.

    python -m launch.prepare_data --dataset=NAME --source=DIR --data_dir=DIR

A second call does nothing if the source is unchanged, and fails otherwise. It can be
interrupted at any time and called again.
"""

import dataclasses
from collections.abc import Mapping

from launch import cli
from mpmc_jax.data import check, registry
from mpmc_jax.data.dataset import has_changed, is_prepared, open_dataset
from mpmc_jax.data.source import Source
from mpmc_jax.paths import as_path


def prepare(source: Source, data_dir: str) -> str:
    """Prepares a data set unless it exists already; returns a summary.

    Raises:
      ValueError: the source has problems, or the prepared data set was made from
        another source.
      OSError: a file cannot be read or written.
    """
    if is_prepared(data_dir, source.name):
        return _compare(source, data_dir)
    report = check.check_source(source)
    if report.problems:
        raise ValueError(check.failure(report))
    source = dataclasses.replace(source, pixels=report.measured)
    try:
        directory = registry.prepare(
            source, report.present, data_dir, report.digests, report.warnings
        )
    except FileExistsError:  # another process prepared it meanwhile
        return _compare(source, data_dir, report.digests)
    lines = [check.summary(source), *report.remarks(), f"Prepared in {directory}"]
    return "\n".join(lines)


def _compare(
    source: Source, data_dir: str, digests: Mapping[str, bytes] | None = None
) -> str:
    """A summary of a data set that is prepared already; raises as `prepare`."""
    info = open_dataset(data_dir, source.name)
    if has_changed(source, data_dir, digests):
        raise ValueError(
            f"{info.directory} was made from other data: the source HAS CHANGED since, "
            "or is another. Remove that folder and run again, or give another "
            "--data_dir"
        )
    mark = " It is partial." if info.facts.partial else ""
    return f"Already prepared in {info.directory}; the source has not changed.{mark}"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("prepare_data", __doc__)
    cli.add_source(parser)
    parser.add_argument(
        "--data_dir", default="data", help="where prepared data sets lie (data)"
    )
    args = parser.parse_args(arguments)
    with cli.user_errors():
        data_dir = as_path("--data_dir", args.data_dir)
        if data_dir.is_file():
            raise ValueError(f"--data_dir={data_dir} is a file; name a folder")
        print(prepare(cli.read_source(args), str(data_dir)))


if __name__ == "__main__":
    main()
