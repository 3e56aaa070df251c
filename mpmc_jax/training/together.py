"""What the processes of one run do together; of a single process, nothing."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_alone() -> bool:
    """Whether one process may save by itself: several do together, or not at all."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def meet(name: str) -> None:
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
