"""The training loop: the only one, for every method, data set and device kind.

It never waits for the step it has just started: numbers are read `LAG` steps later.
"""

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from mpmc_jax.methods.base import Method
from mpmc_jax.training.checkpoint import Checkpointer
from mpmc_jax.training.config import LAG, StepConfig
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.phases import Programs
from mpmc_jax.training.report import Report, duration
from mpmc_jax.training.signals import StopRequest
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import Metrics
from mpmc_jax.types import Batch

_LOG = logging.getLogger(__name__)

_STOPPED = (
    "stopped by {} at step {}, which is saved; the same command goes on from there"
)


class NonFiniteError(RuntimeError):
    """A loss term or the gradient was not finite; the state before it is saved."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its state is saved."""


class DataIterator(Protocol):
    """Batches from a position on; the position is the step."""

    def __next__(self) -> Batch: ...

    def request(self, step: int, images: np.ndarray) -> None:
        """Asks for the partner images of a later step."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        ...

    def close(self) -> None:
        """Ends the reading threads."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run, in steps, and the figure that checkpoints rank by."""

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    metric: str = "val/miou"

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"train.{name}={value}: at least 1 is needed")


@dataclasses.dataclass
class _Pending:
    """A step under way; `read` waits for it and gives its numbers."""

    step: int
    read: Callable[[], Metrics]
    batch: Batch


def train(
    config: LoopConfig,
    step_config: StepConfig,
    parallel: Parallel,
    state: TrainState,
    data: DataIterator,
    *,
    evaluate: Callable[[TrainState], dict[str, float]],
    checkpointer: Checkpointer,
    report: Report,
    names: Callable[[Batch], dict[str, list[str]]],
    place: Callable[[Batch], Batch],
) -> TrainState:
    """Trains from `state` (on the host) to `config.steps`; returns the last state.

    Args:
      evaluate: numbers of one copy of the state, `config.metric` among them.
      names: the ids of a batch's records, for messages.
      place: puts a batch on the devices.

    Raises:
      NonFiniteError: the update was refused; the state before it is saved.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    start = int(state.step)
    if start >= config.steps:
        _LOG.info("finished already: step %d of %d", start, config.steps)
        return state
    _request_first(step_config.method, state, data, config.steps)
    programs = Programs(parallel, step_config)
    device_state = parallel.replicate(state)
    pending: collections.deque[_Pending] = collections.deque()
    with StopRequest() as stop:
        for step in range(start, config.steps):
            batch, begin, is_first = next(data), time.monotonic(), programs.lack(step)
            run, expected = programs.at(step), parallel.replicate(np.int32(step))
            device_state, metrics = run(device_state, place(batch), expected)
            if is_first:
                _first_step(metrics, begin, report)
            stop.has_progress = True
            pending.append(_Pending(step, parallel.start_reading(metrics), batch))
            done = step + 1
            leaving = stop.requested and done < config.steps
            turn = leaving or _turn(config, done)
            pause = turn or programs.change(done)  # a line is of one phase
            try:
                for read in _settle(pending, 0 if pause else LAG):
                    _take_up(config, step_config.method, *read, report, data)
            except _RefusedError as refused:
                _stop_refused(refused, parallel, device_state, checkpointer, names)
            if pause:
                report.flush(done)
            if turn:
                # Whoever asks for a stop gives no time for an evaluation.
                how = None if leaving or not _is_due(config, done) else evaluate
                one = parallel.fetch(device_state)
                _keep(done, one, how, config.metric, checkpointer, report, data)
            if leaving:
                raise Interrupted(_STOPPED.format(stop.requested, done))
    return parallel.fetch(device_state)


def _keep(
    done: int,
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    metric: str,
    checkpointer: Checkpointer,
    report: Report,
    data: DataIterator,
) -> None:
    """Evaluates if there is how, and saves whatever comes of it."""
    score = None
    try:
        if evaluate is not None:
            score = _evaluate(done, state, evaluate, metric, report)
    finally:
        checkpointer.save(state, data.get_state(), score)
    report.restart_clock()


def _turn(config: LoopConfig, done: int) -> bool:
    """Whether a checkpoint or an evaluation is due after `done` steps."""
    return _is_due(config, done) or done % config.checkpoint_every == 0


def _is_due(config: LoopConfig, done: int) -> bool:
    """Whether an evaluation is."""
    return done % config.eval_every == 0 or done == config.steps


def _evaluate(
    done: int,
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, float]],
    metric: str,
    report: Report,
) -> float | None:
    begin = time.monotonic()
    numbers = evaluate(state)
    report.write(done, numbers)
    _LOG.info(
        "step %d  %s %.4f  (%s)",
        done,
        metric,
        numbers[metric],
        duration(time.monotonic() - begin),
    )
    score = numbers[metric]
    return score if math.isfinite(score) else None


class _RefusedError(Exception):
    def __init__(self, pending: _Pending, metrics: Metrics) -> None:
        super().__init__()
        self.pending = pending
        self.metrics = metrics


def _settle(
    pending: collections.deque[_Pending], left: int
) -> Iterator[tuple[int, Metrics]]:
    """Step and numbers of all steps but the last `left`, as they are read.

    Raises:
      _RefusedError: a step's update was refused.
    """
    while len(pending) > left:
        oldest = pending.popleft()
        metrics = oldest.read()
        if metrics.refused >= 0:
            raise _RefusedError(oldest, metrics)
        yield oldest.step, metrics


def _take_up(
    config: LoopConfig,
    method: Method,
    step: int,
    metrics: Metrics,
    report: Report,
    data: DataIterator,
) -> None:
    """Counts a step's numbers, and passes its requests on."""
    report.add(metrics.values)
    if (step + 1) % config.log_every == 0:
        report.flush(step + 1)
    if metrics.requests is not None and step + method.delay < config.steps:
        data.request(step + method.delay, np.asarray(metrics.requests))


def _request_first(
    method: Method, state: TrainState, data: DataIterator, steps: int
) -> None:
    """Asks for the partners that the state's last steps chose."""
    start = int(state.step)
    for step in range(start, min(start + method.delay, steps)):
        data.request(step, np.asarray(method.requested(state.method_state, step)))


def _stop_refused(
    refused: _RefusedError,
    parallel: Parallel,
    device_state: TrainState,
    checkpointer: Checkpointer,
    names: Callable[[Batch], dict[str, list[str]]],
) -> None:
    """Saves the state before the refused step and says what happened."""
    one = parallel.fetch(device_state)
    checkpointer.save(one, {"next_index": int(one.step)}, None)
    terms, index = refused.metrics.finite_names, int(refused.metrics.refused)
    step = refused.pending.step
    if index == len(terms):
        raise RuntimeError(
            f"batch {step} met a state at step {int(one.step)}: data and state are "
            "out of order; this is a defect of the program"
        )
    raise NonFiniteError(
        f"step {step}: {terms[index]} is not finite. The update was "
        f"refused and the state before it is saved (step {int(one.step)}). Images of "
        "this step: "
        f"{names(refused.pending.batch)}. Lower optimizer.lr, use "
        "model.dtype=float32, or look at these images, then start a new run"
    )


def _first_step(metrics: Metrics, begin: float, report: Report) -> None:
    """Waits for the first step: compilation would spoil the first images/s."""
    jax.block_until_ready(metrics)
    _LOG.info("compiled, first step done, %s", duration(time.monotonic() - begin))
    report.restart_clock(untimed=1)
