"""Exchange between the devices of a step, and between the processes of a run.

Over devices: sums, means and gathers along the axis that a step is mapped over. They
are the identity without an axis and on a single device, because XLA for CPUs keeps the
hundreds of all-reduces that a single device does not need.

Between processes: barriers and comparisons on the host, which do nothing in a run of
one process.
"""

from typing import TypeVar

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

T = TypeVar("T")


def count(axis_name: str | None) -> int:
    """Number of devices along the mapped axis; 1 without one."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def total(tree: T, axis_name: str | None) -> T:
    """Arrays -> their sums over devices."""
    return tree if count(axis_name) == 1 else lax.psum(tree, axis_name)


def mean(tree: T, axis_name: str | None) -> T:
    """Arrays -> their means over devices."""
    return tree if count(axis_name) == 1 else lax.pmean(tree, axis_name)


def gathered(tree: T, axis_name: str | None) -> T:
    """Arrays (n,...) -> those of all devices one after the other, in their order."""
    if count(axis_name) == 1:
        return tree
    return lax.all_gather(tree, axis_name, tiled=True)


def is_alone() -> bool:
    """Whether the run has a single process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the place of this name."""
    if not is_alone():
        multihost_utils.sync_global_devices(name)


def all_agree(flag: bool) -> bool:
    """Whether every process says so; the same answer for each of them."""
    if is_alone():
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).all())


def from_first(number: int) -> int:
    """Process 0's number, for every process."""
    if is_alone():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_text(text: str) -> list[str]:
    """The text of every process, in order of their indices."""
    if is_alone():
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(content.size, np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:length].tobytes().decode()
        for row, length in zip(np.asarray(rows), lengths, strict=True)
    ]
