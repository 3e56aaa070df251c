"""Compares what the processes of one run must have in common, before the first step."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mpmc_jax import distributed
from mpmc_jax.training.checkpoint.integrity import CheckpointError
from mpmc_jax.training.workdir import WorkdirError, flatten


class SharedError(ValueError):
    """An error that every process of the run raises at the same place."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Makes every process fail where one of them does.

    The block must not wait for other processes.

    Raises:
      SharedError: another process failed; the message says which one and why.
    """
    failed = None
    try:
        yield
    except (ValueError, OSError, CheckpointError, WorkdirError) as error:
        if distributed.is_alone():
            raise
        failed = error
    if distributed.is_alone():
        return
    messages = distributed.gather_text(str(failed) if failed else "")
    if failed is not None:
        raise SharedError(str(failed)) from failed
    for index, message in enumerate(messages):
        if message:
            raise SharedError(f"process {index} failed: {message}")


def check_same(facts: Mapping[str, Any]) -> None:
    """Compares what processes are about to compute; does nothing for one process.

    Args:
      facts: settings, data and versions as JSON values; nested names are joined by
        dots.

    Raises:
      SharedError: they differ between processes; the message lists the differences.
    """
    if distributed.is_alone():
        return
    mine = json.dumps(flatten(dict(facts)), default=str)
    first, *others = map(json.loads, distributed.gather_text(mine))
    lines = [
        f"  {name}: {first.get(name, 'absent')!r} in process 0, "
        f"{other.get(name, 'absent')!r} in process {index}"
        for index, other in enumerate(others, start=1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if lines:
        raise SharedError(
            "the processes of this run differ:\n"
            + "\n".join(lines)
            + "\nStart all of them with the same command, data and code."
        )
