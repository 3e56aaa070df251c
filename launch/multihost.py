"""Joining the processes of one run: on a TPU pod, under SLURM, or by hand."""

import argparse
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

from launch import cli, rendezvous
from mpmc_jax.text import quantity
from mpmc_jax.training.agreement import SharedError

# A process that does not answer for so long is taken for dead; the others end.
HEARTBEAT_SECONDS = 60

# So long the processes of a run wait for each other at the start.
START_SECONDS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What tells a program that it is one of several processes, see `join`."""
    parser.add_argument(
        "--distributed", action="store_true", help="JAX finds the others (TPU pods)"
    )
    parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=0, help="how many there are")
    parser.add_argument("--process", type=int, default=-1, help="which this one is")


def join(*, found: bool, coordinator: str, count: int, index: int) -> None:
    """Makes this process one of a run's; a run of one process needs nothing.

    To be called before JAX is first used. Ends the process, with JAX's own message
    that names the dead one, when another of the run dies.

    Args:
      found: JAX finds the others from the machine (TPU pods); under srun it is asked
        to by itself.
      coordinator: HOST:PORT of process 0, where they are told by hand.
      count, index: with it, how many there are and which this one is.

    Raises:
      ValueError: one of the three is missing or out of range, JAX finds nothing, or a
        process does not come within START_SECONDS or comes twice.
    """
    by_hand = bool(coordinator) or count > 0 or index >= 0
    address = re.fullmatch(r".+:\d+", coordinator)
    if by_hand and not (address and 0 <= index < count):
        raise ValueError(
            f"--coordinator={coordinator} --processes={count} --process={index}: all "
            "three are needed, HOST:PORT of process 0, their number and 0 to number - 1"
        )
    if by_hand and found:
        raise ValueError(
            "--distributed and --coordinator: give one; the first is for TPU pods, "
            "where JAX finds the others"
        )
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if by_hand:
        print(f"waiting for {quantity(count, 'process')} at {coordinator}", flush=True)
        rendezvous.wait(coordinator, count, index, START_SECONDS)
        with _time_limit(f"process {index} of {count}"):
            initialize(coordinator, count, index)
    elif found or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        try:
            with _time_limit(f"process {os.environ.get('SLURM_PROCID', 'here')}"):
                initialize()
        except ValueError as error:
            raise ValueError(
                f"no other processes are found here ({error}); tell them by hand: "
                "--coordinator=HOST:PORT --processes=NUMBER --process=0, 1, ..."
            ) from error
    else:
        return
    # JAX's preemption service, which Orbax asks for, swallows SIGTERM; before the
    # loop takes it, it shall end the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _time_limit(name: str) -> Iterator[None]:
    """Ends this process where JAX waits in vain: it would abort minutes later."""

    def end() -> None:
        print(
            f"error: {name} waited {START_SECONDS} s for the other processes of the "
            "run, and not all came: look at what they say, and start all of them again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(START_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Of several processes, one that fails ends at once, and the others after it.

    An ordinary exit would wait for the others, and they for its part of a step. They
    meet its absence in their next exchange, at once or when its heartbeats have been
    missing for HEARTBEAT_SECONDS.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or _is_planned(error):
            raise
        name = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error.__context__, SharedError):
            # All are here: an ordinary exit, in which they wait for each other.
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: {name} failed, or lost another one "
                f"({str(error).splitlines()[0]}); JAX names a lost one below within "
                f"{HEARTBEAT_SECONDS} s. What the newest checkpoint holds is kept: "
                "start all of them again",
                file=sys.stderr,
                flush=True,
            )
            jax.distributed.shutdown()  # does not come back from a lost one
        elif isinstance(error, SystemExit):
            if isinstance(error.code, int):
                os._exit(error.code)
            print(f"{name}: {error.code}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        os._exit(1)


def _is_planned(error: BaseException) -> bool:
    """Whether all processes end so: done, or stopped by a signal with all saved."""
    return isinstance(error, SystemExit) and error.code in (None, 0, cli.STOPPED)
