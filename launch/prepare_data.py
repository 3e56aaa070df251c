"""Checks a data set and writes it as the records that training reads.

    python -m launch.prepare_data --dataset=NAME --source=DIR --data_dir=DIR

A second call does nothing if the source is unchanged, and fails otherwise. It can be
interrupted at any time and called again. For your own images (--dataset=folder), --init
first writes the classes that it finds in the masks to DIR/classes.json, and images
without masks to DIR/unlabeled.txt, and at last a configuration for launch.train to
DIR/config.py; it never overwrites a file.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from launch import cli
from mpmc_jax.data import check, registry
from mpmc_jax.data.dataset import has_changed, is_prepared, open_dataset
from mpmc_jax.data.own import start
from mpmc_jax.data.source import Source
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable


def prepare(source: Source, data_dir: str, report: check.Report | None = None) -> str:
    """Prepares a data set unless it exists already; returns a summary.

    Args:
      source: the data set.
      data_dir: folder of all prepared data sets.
      report: the result of checking the source; None to check it if necessary.

    Raises:
      ValueError: the source has problems, or the prepared data set was made from
        another source.
      OSError: a file cannot be read or written.
    """
    if is_prepared(data_dir, source.name):
        return _compare(source, data_dir, report.digests if report else None)
    report = report or check.check_source(source)
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


def _init(args: argparse.Namespace, data_dir: str) -> None:
    """Writes what is missing before and after preparing a user's data set.

    Raises:
      ValueError, OSError: see `prepare` and `start`.
    """
    if args.dataset != "folder":
        raise ValueError(f"--init is for --dataset=folder, not {args.dataset}")
    directory = as_path("--source", args.source)
    if not directory.is_dir():
        raise FileNotFoundError(f"--source={directory}: no such folder")
    told = start.write_classes(directory, cli.class_names(args))
    _print(told.lines)
    made, lines = [directory / "classes.json"], []
    try:
        source, report, written = _check_init(args, directory)
        _print(written)
        print(prepare(source, data_dir, report))
        # Prepared from these masks, by an earlier call if not by this one.
        made.append(pathlib.Path(data_dir, source.name))
        is_new = not (directory / "config.py").exists()
        lines = start.write_config(source, report, directory, data_dir)
        made += [directory / "config.py"] * is_new
    finally:
        _print(f"warning: {_with_mend(text, made)}" for text in told.warnings)
    _print(lines)


def _with_mend(warning: str, made: list[pathlib.Path]) -> str:
    """Adds to a warning of a mask how to begin again without what was made of it."""
    *others, last = map(str, made)
    listed = f"{', '.join(others)} and {last}" if others else last
    return (
        f"{warning}; if it is a stray value, mend the mask, remove {listed}, and run "
        "this again"
    )


def _check_init(
    args: argparse.Namespace, directory: pathlib.Path
) -> tuple[Source, check.Report, list[str]]:
    """Checks a user's folder with the unlabeled.txt that it may lack.

    That file stays only if there is no problem: it would list misplaced images too.

    Returns:
      The source, the result of checking it, and what was written, one line each.

    Raises:
      ValueError, OSError: see `prepare` and `start`.
    """
    lines = start.write_unlabeled(directory, args.unlabeled)
    try:
        source = cli.read_source(args, classes=())
        report = check.check_source(source)
        if report.problems:
            raise ValueError(check.failure(report))
    except BaseException:
        if lines:
            (directory / "unlabeled.txt").unlink(missing_ok=True)
        raise
    return source, report, lines


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))


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
    parser.add_argument(
        "--init",
        action="store_true",
        help="write classes.json, unlabeled.txt and config.py where they are missing",
    )
    args = parser.parse_args(arguments)
    with cli.user_errors():
        data_dir = as_path("--data_dir", args.data_dir)
        if data_dir.is_file():
            raise ValueError(f"--data_dir={data_dir} is a file; name a folder")
        if args.init:
            _init(args, str(data_dir))
        else:
            source = cli.read_source(args, cli.class_names(args))
            print(prepare(source, str(data_dir)))


if __name__ == "__main__":
    main()
