"""Joining the processes of one run: on a TPU pod, under SLURM, or by hand."""

import functools
import os

import jax

# A process that does not answer for so long is taken for dead; the others end.
HEARTBEAT_SECONDS = 100


def join(*, found: bool, coordinator: str, count: int, index: int) -> None:
    """Makes this process one of a run's; a run of one process needs nothing.

    To be called before JAX is first used. Ends the process, with JAX's own message,
    when another of the run dies.

    Args:
      found: JAX finds the others from the machine (TPU pods); under srun it is asked
        to by itself.
      coordinator: HOST:PORT of process 0, where they are told by hand.
      count, index: with it, how many there are and which this one is.

    Raises:
      ValueError: one of the three is missing or out of range.
    """
    by_hand = bool(coordinator) or count > 0 or index >= 0
    if by_hand and not (coordinator and 0 <= index < count):
        raise ValueError(
            f"--coordinator={coordinator} --processes={count} --process={index}: all "
            "three are needed, HOST:PORT of process 0, their number and 0 to number - 1"
        )
    initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
    if by_hand:
        initialize(coordinator, count, index)
    elif found or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        initialize()
