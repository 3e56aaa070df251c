"""Runs many trainings, each in a process of its own, some at once."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from launch import cli
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.experiments.paper.results import Place, last_line, read_outcome
from mpmc_jax.text import printable, quantity
from mpmc_jax.training.loop import Interrupted
from mpmc_jax.training.metric_writer import duration

_POLL_SECONDS = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def train_all(
    runs: Sequence[PlannedRun],
    commands: Mapping[str, Sequence[str]],
    place: Place,
    jobs: int,
) -> int:
    """Trains the runs that are not finished, `jobs` at once.

    A run that fails leaves the others alone. With CUDA_VISIBLE_DEVICES, each of the
    processes that run at once gets its share of the devices.

    Args:
      runs: the runs, in order.
      commands: the command of each run, by its name.
      place: where their directories and logs are.
      jobs: processes at once.

    Returns:
      The number of runs that failed.

    Raises:
      Interrupted: a signal came; the runs have saved their state and ended.
    """
    waiting, failed, slots = list(runs), 0, list(range(jobs))
    running: dict[subprocess.Popen, tuple[PlannedRun, int, float]] = {}
    with _stopping() as stopped:
        while (waiting and not stopped) or running:
            while waiting and slots and not stopped:
                run = waiting.pop(0)
                if read_outcome(run, place).state == "finished":
                    _say(run, "finished already")
                    continue
                slot = slots.pop(0)
                process = _start(run, commands[run.name], place, slot, jobs)
                running[process] = run, slot, time.monotonic()
                left = quantity(len(waiting), "run")
                _say(run, f"started; {left} to come (log: {place.log(run)})")
            if stopped:
                for process, (run, _, _) in running.items():
                    process.send_signal(stopped[0])
                    _say(run, "stopping after its step, or after compiling")
            for process in list(running):
                if stopped or process.poll() is not None:
                    run, slot, begin = running.pop(process)
                    slots.append(slot)
                    failed += _ended(process, run, begin, place, bool(stopped))
            time.sleep(_POLL_SECONDS)
    if stopped:
        raise Interrupted(
            "stopped; what has run is saved, and the same command resumes"
        )
    return failed


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and Ctrl-C add the signal for the processes."""
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        came.append(signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    run: PlannedRun, command: Sequence[str], place: Place, slot: int, jobs: int
) -> subprocess.Popen:
    """Starts a run's program."""
    log = place.log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    place.failure(run).unlink(missing_ok=True)
    environment = dict(os.environ)
    devices = [each for each in environment.get(_VISIBLE, "").split(",") if each]
    if devices:
        environment[_VISIBLE] = ",".join(devices[slot % len(devices) :: jobs])
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches this program alone, which hands it on.
            start_new_session=True,
        )


def _ended(
    process: subprocess.Popen, run: PlannedRun, begin: float, place: Place, asked: bool
) -> bool:
    """Waits for a program and tells how it ended; returns whether it failed."""
    code = process.wait()
    took = duration(time.monotonic() - begin)
    if code == 0:
        outcome = read_outcome(run, place)
        score = f"{outcome.metric} {outcome.last():.4f}, " if outcome.metric else ""
        _say(run, f"finished, {score}{took}")
        return False
    if asked or code == cli.STOPPED:
        _say(run, "stopped")
        return False
    reason = last_line(place.log(run)).removeprefix("error: ")
    place.failure(run).write_text(f"{reason}\n")
    _say(run, f"FAILED after {took}: {reason} (log: {place.log(run)})")
    return True


def _say(run: PlannedRun, what: str) -> None:
    print(printable(f"{run.name}: {what}"), file=sys.stderr, flush=True)
