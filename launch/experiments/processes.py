"""Runs many trainings, each in a process of its own, some at once.

A finished run may be evaluated once more, in a process of its own too.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType

from launch import cli
from mpmc_jax.experiments.paper import final_evaluation
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.experiments.paper.results import Place, last_line, read_outcome
from mpmc_jax.text import printable, quantity
from mpmc_jax.training.loop import Interrupted
from mpmc_jax.training.metric_writer import duration

_POLL_SECONDS = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class _Job:
    """A program that trains a run, or evaluates it.

    Attributes:
      run: the run.
      slot: its number among the programs that run at once.
      evaluates: whether it evaluates the finished run.
      begin: when it started, in seconds of the monotonic clock.
    """

    run: PlannedRun
    slot: int
    evaluates: bool
    begin: float = dataclasses.field(default_factory=time.monotonic)


def train_all(
    runs: Sequence[PlannedRun],
    commands: Mapping[str, Sequence[str]],
    place: Place,
    jobs: int,
    evaluations: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> int:
    """Trains the runs that are not finished, `jobs` at once.

    A run in `evaluations` is evaluated after it is finished, unless it was before.

    A run that fails leaves the others alone. With CUDA_VISIBLE_DEVICES, each of the
    processes that run at once gets its share of the devices.

    Args:
      runs: the runs, in order.
      commands: the command of each run, by its name.
      place: where their directories and logs are.
      jobs: processes at once.
      evaluations: the command of a run's final evaluation, by the run's name.

    Returns:
      The number of runs that failed.

    Raises:
      Interrupted: a signal came; the runs have saved their state and ended.
    """
    waiting, failed, slots = list(runs), 0, list(range(jobs))
    running: dict[subprocess.Popen, _Job] = {}
    with _stopping() as stopped:
        while (waiting and not stopped) or running:
            while waiting and slots and not stopped:
                run = waiting.pop(0)
                evaluates = read_outcome(run, place).state == "finished"
                if evaluates and not _is_due(run, place, evaluations):
                    _say(run, "finished already")
                    continue
                command = (evaluations if evaluates else commands)[run.name]
                job = _Job(run, slots.pop(0), evaluates)
                running[_start(job, command, place, jobs)] = job
                what = "evaluation started" if evaluates else "started"
                left = quantity(len(waiting), "run")
                _say(run, f"{what}; {left} to come (log: {place.log(run)})")
            if stopped:
                for process, job in running.items():
                    process.send_signal(stopped[0])
                    _say(job.run, "stopping after its step, or after compiling")
            for process in list(running):
                if stopped or process.poll() is not None:
                    job = running.pop(process)
                    slots.append(job.slot)
                    failed += _ended(process, job, place, bool(stopped))
                    if not job.evaluates and _is_due(job.run, place, evaluations):
                        waiting.insert(0, job.run)
            time.sleep(_POLL_SECONDS)
    if stopped:
        raise Interrupted(
            "stopped; what has run is saved, and the same command resumes"
        )
    return failed


def _is_due(
    run: PlannedRun, place: Place, evaluations: Mapping[str, Sequence[str]]
) -> bool:
    """Whether a run is finished, but not its final evaluation."""
    return run.name in evaluations and final_evaluation.is_due(run, place)


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
    job: _Job, command: Sequence[str], place: Place, jobs: int
) -> subprocess.Popen:
    """Starts a run's program."""
    log = place.log(job.run)
    log.parent.mkdir(parents=True, exist_ok=True)
    place.failure(job.run).unlink(missing_ok=True)
    environment = dict(os.environ)
    devices = [each for each in environment.get(_VISIBLE, "").split(",") if each]
    if devices:
        environment[_VISIBLE] = ",".join(devices[job.slot % len(devices) :: jobs])
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


def _ended(process: subprocess.Popen, job: _Job, place: Place, asked: bool) -> bool:
    """Waits for a program and tells how it ended; returns whether it failed."""
    code, run = process.wait(), job.run
    took = duration(time.monotonic() - job.begin)
    if code == 0 and job.evaluates:
        _say(run, f"evaluated, {took}")
        return False
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
