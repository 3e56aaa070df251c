"""The training loop: the only one, for every method, data set and device kind.

It never waits for the step it has just started: numbers are read `LAG` steps later.
"""

import collections
import dataclasses
import logging
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np

from mpmc_jax.training.checkpoint import METRIC, Checkpointer
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.report import Report, duration
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import Metrics, make_step
from mpmc_jax.types import Batch

_LOG = logging.getLogger(__name__)

# Steps that may be under way before the loop reads a step's numbers.
LAG = 2

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

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        ...

    def close(self) -> None:
        """Ends the reading threads."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run, in steps."""

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"train.{field.name}={value}: at least 1 is needed")


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
) -> TrainState:
    """Trains from `state` (on the host) to `config.steps`; returns the last state.

    Args:
      evaluate: numbers of one copy of the state, "val/miou" among them.
      names: the ids of a batch's records, for messages.

    Raises:
      NonFiniteError: the update was refused; the state before it is saved.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    start = int(state.step)
    if start >= config.steps:
        _LOG.info("finished already: step %d of %d", start, config.steps)
        return state
    _LOG.info("compiling the step; on a CPU this takes minutes")
    compiled = parallel.compile(make_step(step_config))
    device_state = parallel.replicate(state)
    pending: collections.deque[_Pending] = collections.deque()
    with _StopRequest() as stop:
        for step in range(start, config.steps):
            batch, begin = next(data), time.monotonic()
            placed = parallel.place(batch)
            expected = parallel.replicate(np.asarray(step, np.int32))
            device_state, metrics = compiled(device_state, placed, expected)
            if step == start:
                _first_step(metrics, begin, report)
            pending.append(_Pending(step, parallel.start_reading(metrics), batch))
            done = step + 1
            leaving = stop.requested and done < config.steps
            turn = leaving or _turn(config, done)
            try:
                _settle(config, pending, 0 if turn else LAG, report)
            except _RefusedError as refused:
                _stop_refused(refused, parallel, device_state, checkpointer, names)
            if turn:
                report.flush(done)
                one, miou = parallel.fetch(device_state), None
                try:
                    # Whoever asks for a stop gives no time for an evaluation.
                    if _evaluation_is_due(config, done) and not leaving:
                        miou = _evaluate(done, one, evaluate, report)
                finally:
                    checkpointer.save(one, data.get_state(), miou)
                report.restart_clock()
            if leaving:
                checkpointer.close()
                raise Interrupted(_STOPPED.format(stop.requested, done))
    return parallel.fetch(device_state)


def _turn(config: LoopConfig, done: int) -> bool:
    """Whether a checkpoint or an evaluation is due after `done` steps."""
    return _evaluation_is_due(config, done) or done % config.checkpoint_every == 0


def _evaluation_is_due(config: LoopConfig, done: int) -> bool:
    return done % config.eval_every == 0 or done == config.steps


def _evaluate(
    done: int,
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, float]],
    report: Report,
) -> float:
    begin = time.monotonic()
    numbers = evaluate(state)
    report.write(done, numbers)
    _LOG.info(
        "step %d  val/miou %.4f  (%s)",
        done,
        numbers[METRIC],
        duration(time.monotonic() - begin),
    )
    return numbers[METRIC]


class _RefusedError(Exception):
    def __init__(self, pending: _Pending, metrics: Metrics) -> None:
        super().__init__()
        self.pending = pending
        self.metrics = metrics


def _settle(
    config: LoopConfig,
    pending: collections.deque[_Pending],
    left: int,
    report: Report,
) -> None:
    """Reads the numbers of all steps but the last `left`.

    Raises:
      _RefusedError: a step's update was refused.
    """
    while len(pending) > left:
        oldest = pending.popleft()
        metrics = oldest.read()
        if metrics.refused >= 0:
            raise _RefusedError(oldest, metrics)
        report.add(metrics.values)
        done = oldest.step + 1
        if done % config.log_every == 0:
            report.flush(done)


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
    checkpointer.close()
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


class _StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop sees between steps.

    The second one acts at once: a compilation or an evaluation may take long.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        _LOG.warning(
            "%s: stopping after this step; once more to end now", self.requested
        )
        signal.signal(number, self._previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
