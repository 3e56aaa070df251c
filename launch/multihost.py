"""Joins the processes of one run: on a TPU pod, under SLURM, or set explicitly."""

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
from mpmc_jax import distributed
from mpmc_jax.text import first_line, quantity
from mpmc_jax.training.agreement import SharedError

# A process without a heartbeat for this long counts as dead, and the others exit.
HEARTBEAT_SECONDS = 60

# How long the processes of a run wait for each other at the start.
START_SECONDS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a program that may run as several processes, see `join`."""
    parser.add_argument(
        "--distributed", action="store_true", help="discover the processes (TPU pods)"
    )
    parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=0, help="number of processes")
    parser.add_argument("--process", type=int, default=-1, help="index of this process")


def join(*, discover: bool, coordinator: str, count: int, index: int) -> None:
    """Joins this process to the others of its run; does nothing for a single process.

    Call it before JAX is first used. If a process of the run dies later, JAX ends this
    one with a message that names the dead one.

    Args:
      discover: lets JAX discover the processes (TPU pods); under srun it always does.
      coordinator: HOST:PORT of process 0, where the processes are set explicitly.
      count: with `coordinator`, the number of processes.
      index: with `coordinator`, the index of this process.

    Raises:
      ValueError: one of the three is missing or out of range, JAX discovers no process,
        or a process does not connect within START_SECONDS or connects twice.
    """
    explicit = bool(coordinator) or count > 0 or index >= 0
    address = re.fullmatch(r".+:(\d+)", coordinator)
    port_fits = address is not None and 1 <= int(address[1]) <= 65535
    if explicit and not (port_fits and 0 <= index < count):
        raise ValueError(
            f"--coordinator={coordinator} --processes={count} --process={index}: all "
            "three are needed, HOST:PORT of process 0 (a port of 1 to 65535), their "
            "number and 0 to number - 1"
        )
    if explicit and discover:
        raise ValueError(
            "--distributed and --coordinator: give one; the first is for TPU pods, "
            "where JAX discovers the processes"
        )
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if explicit:
        print(f"waiting for {quantity(count, 'process')} at {coordinator}", flush=True)
        rendezvous.wait(coordinator, count, index, START_SECONDS)
        with _time_limit(f"process {index} of {count}"):
            initialize(coordinator, count, index)
    elif discover or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        try:
            with _time_limit(f"process {os.environ.get('SLURM_PROCID', 'here')}"):
                initialize()
        except ValueError as error:
            raise ValueError(
                f"no other processes were discovered ({error}); set them explicitly: "
                "--coordinator=HOST:PORT --processes=NUMBER --process=0, 1, ..."
            ) from error
    else:
        return
    # Orbax turns on JAX's preemption service, which swallows SIGTERM. The signal must
    # end the process until the training loop handles it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The first collective connects the processes and waits 30 s at most; later ones
    # wait for as long as a process takes to read its data.
    distributed.barrier("joined")


@contextlib.contextmanager
def _time_limit(name: str) -> Iterator[None]:
    """Exits if the block takes longer than START_SECONDS.

    JAX itself would wait for minutes, then abort with a stack trace.
    """

    def end() -> None:
        print(
            f"error: {name} waited {START_SECONDS} s for the other processes of the "
            "run, and some are missing: read their messages, then start all of them",
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
def exit_on_failure() -> Iterator[None]:
    """Makes a process of several exit at once when it fails.

    An ordinary exit would wait for the other processes, which wait for this one in
    their next collective. That collective fails when this process is gone, at the
    latest after HEARTBEAT_SECONDS, and the others exit too.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or _is_regular_exit(error):
            raise
        name = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error.__context__, SharedError):
            # All processes raise it, so an ordinary exit does not wait in vain.
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: {name} failed, or lost another process "
                f"({first_line(error)}); JAX names a lost one below within "
                f"{HEARTBEAT_SECONDS} s. The newest checkpoint is intact: start all "
                "processes again",
                file=sys.stderr,
                flush=True,
            )
            jax.distributed.shutdown()  # does not return if a process is lost
        elif isinstance(error, SystemExit):
            if isinstance(error.code, int):
                os._exit(error.code)
            print(f"{name}: {error.code}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        os._exit(1)


def _is_regular_exit(error: BaseException) -> bool:
    """Whether all processes exit this way: finished, or stopped by a signal."""
    return isinstance(error, SystemExit) and error.code in (None, 0, cli.STOPPED)
