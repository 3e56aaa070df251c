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
from mpmc_jax.training.gradient import StepConfig
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.report import Report, duration
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import Metrics, make_step
from mpmc_jax.types import Batch

_LOG = logging.getLogger(__name__)

# Steps that may be under way before the loop reads a step's numbers.
LAG = 2


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


@dataclasses.dataclass
class _Pending:
    """A step under way."""

    step: int
    metrics: Metrics
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
    compiled = parallel.compile(make_step(step_config))
    start = int(state.step)
    device_state = parallel.replicate(state)
    pending: collections.deque[_Pending] = collections.deque()
    with _StopRequest() as stop:
        for step in range(start, config.steps):
            batch = next(data)
            expected = parallel.replicate(np.asarray(step, np.int32))
            begin = time.monotonic()
            device_state, metrics = compiled(
                device_state, parallel.place(batch), expected
            )
            if step == start:
                _first_step(metrics, begin, report)
            pending.append(_Pending(step, metrics, batch))
            done = step + 1
            turn = _turn(config, done) or stop.requested
            while len(pending) > (0 if turn else LAG):
                try:
                    _settle(pending.popleft(), parallel, report)
                except _RefusedError as refused:
                    _stop_refused(refused, parallel, device_state, checkpointer, names)
            if done % config.log_every == 0 or done == config.steps:
                report.flush(done - len(pending))
            if turn:
                one = parallel.fetch(device_state)
                miou = _evaluate(config, done, one, evaluate, report)
                checkpointer.save(one, data.get_state(), miou)
                report.pause()
            if stop.requested and done < config.steps:
                checkpointer.close()
                raise Interrupted(
                    f"stopped by {stop.requested} at step {done}, which is saved; the "
                    "same command goes on from there"
                )
    return parallel.fetch(device_state)


def _turn(config: LoopConfig, done: int) -> bool:
    """Whether a checkpoint or an evaluation is due after `done` steps."""
    return (
        done % config.eval_every == 0
        or done % config.checkpoint_every == 0
        or done == config.steps
    )


def _evaluate(
    config: LoopConfig,
    done: int,
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, float]],
    report: Report,
) -> float | None:
    if done % config.eval_every and done != config.steps:
        return None
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
    def __init__(self, pending: _Pending, index: int) -> None:
        super().__init__()
        self.pending = pending
        self.index = index


def _settle(pending: _Pending, parallel: Parallel, report: Report) -> None:
    """Reads a step's numbers; raises _RefusedError if its update was refused."""
    metrics = jax.device_get(parallel.fetch(pending.metrics))
    if int(metrics.refused) >= 0:
        raise _RefusedError(pending, int(metrics.refused))
    report.add(metrics.values)


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
    terms = refused.pending.metrics.finite_names
    step = refused.pending.step
    if refused.index == len(terms):
        raise RuntimeError(
            f"batch {step} met a state at step {int(one.step)}: data and state are "
            "out of order; this is a defect of the program"
        )
    raise NonFiniteError(
        f"step {step}: {terms[refused.index]} is not finite. The update was "
        f"refused and the state before it is saved (step {int(one.step)}). Images of "
        "this step: "
        f"{names(refused.pending.batch)}. Lower optimizer.lr, use "
        "model.dtype=float32, or look at these images, then start a new run"
    )


def _first_step(metrics: Metrics, begin: float, report: Report) -> None:
    """Waits for the first step: compilation would spoil the first images/s."""
    jax.block_until_ready(metrics)
    _LOG.info("compiled, first step done, %s", duration(time.monotonic() - begin))
    report.pause()


class _StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop sees between steps."""

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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
