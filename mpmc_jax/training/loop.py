"""The training loop: the only one, for every method, data set and device kind.

It never waits for the step it has just started: numbers are read `LAG` steps later.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from mpmc_jax import distributed
from mpmc_jax.methods.base import Method
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.compiled_steps import Programs
from mpmc_jax.training.config import LAG, StepConfig
from mpmc_jax.training.metric_writer import MetricWriter, duration
from mpmc_jax.training.metrics_queue import Pending, RefusedError
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.signals import Broken, StopRequest
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import Metrics, make_step_info
from mpmc_jax.types import Batch, PyTree

_LOG = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A number of a step was not finite; the state before that step is saved."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its state is saved."""


class DataIterator(Protocol):
    """Batches from a position on; the position is the step."""

    def __next__(self) -> Batch: ...

    def request(self, step: int, images: np.ndarray) -> None:
        """Asks for the partner images of a later step."""

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        ...

    def close(self) -> None:
        """Ends the reading threads."""


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


def train(
    config: LoopConfig,
    step_config: StepConfig,
    parallel: Parallel,
    state: TrainState,
    data: DataIterator,
    *,
    evaluate: Callable[[TrainState], dict[str, float]],
    checkpointer: Checkpointer,
    report: MetricWriter,
    names: Callable[[Batch], dict[str, list[str]]],
    place: Callable[[Batch], Batch],
    recompute_bn_stats: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """Trains from `state` (on the host) to `config.steps`; returns the last state.

    Args:
      evaluate: numbers of one copy of the state, `config.metric` among them.
      names: the ids of a batch's records, for messages.
      place: puts a batch on the devices.
      recompute_bn_stats: the replicated state -> the one with which an evaluation and
        the run go on.

    Raises:
      NonFiniteError: the update was refused; the state before it is saved.
      Interrupted: a signal came, here or to another process; the state is saved.
    """
    start = int(state.step)
    keepers = evaluate, checkpointer, report, names, recompute_bn_stats
    run = _Run(config, step_config.method, parallel, data, *keepers)
    programs = Programs(parallel, step_config)
    run.request_first(state)
    run.state = parallel.replicate(state)
    with run.stop as stop:
        run.run_pending_eval(state)
        for step in range(start, config.steps):
            batch = run.next_batch(step, start)
            begin, is_first = time.monotonic(), programs.lack(step)
            stop.has_progress = not is_first
            order = parallel.replicate(make_step_info(step, bool(stop.requested)))
            run.state, metrics = programs.at(step)(run.state, place(batch), order)
            if is_first:
                _first_step(metrics, begin, report)
            stop.has_progress = True
            run.pending.add(step, parallel.start_reading(metrics), batch)
            done = step + 1
            # Several processes stop behind the same step: the first that tells all.
            at_once = distributed.is_alone() and bool(stop.requested)
            # A phase is saved and its lines are written before the next one compiles.
            change = programs.change(done)
            turn = at_once or change or _turn(config, done)
            told = run.read(done, 0 if turn else LAG)
            leaving = (at_once or told) and done < config.steps
            if turn or leaving:
                # Whoever asks for a stop gives no time for an evaluation.
                evaluating = _is_due(config, done) and not leaving
                run.keep(done, evaluating=evaluating, wait=change or leaving)
            if leaving:
                raise _interrupted(stop.requested or "another process", done)
    return parallel.fetch(run.state)


def _interrupted(by: str, step: int) -> Interrupted:
    return Interrupted(
        f"stopped by {by} at step {step}, which is saved; the same command goes on "
        "from there"
    )


def _turn(config: LoopConfig, done: int) -> bool:
    """Whether a checkpoint or an evaluation is due after `done` steps."""
    return _is_due(config, done) or done % config.checkpoint_every == 0


def _is_due(config: LoopConfig, done: int) -> bool:
    """Whether an evaluation is."""
    return done % config.eval_every == 0 or done == config.steps


@dataclasses.dataclass
class _Run:
    """A run under way: its state on the devices, and what reads and keeps it.

    `pending` are the steps whose numbers are still to be read.
    """

    config: LoopConfig
    method: Method
    parallel: Parallel
    data: DataIterator
    evaluate: Callable[[TrainState], dict[str, float]]
    checkpointer: Checkpointer
    report: MetricWriter
    names: Callable[[Batch], dict[str, list[str]]]
    recompute_bn_stats: Callable[[TrainState], TrainState] | None
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    pending: Pending = dataclasses.field(default_factory=Pending)
    state: Any = None

    def request_first(self, state: TrainState) -> None:
        """Asks for the partners that the state's last steps chose."""
        start, delay = int(state.step), self.method.delay
        for step in range(start, min(start + delay, self.config.steps)):
            images = self.method.requested(state.method_state, step)
            self.data.request(step, np.asarray(images))

    def next_batch(self, step: int, start: int) -> Batch:
        """A step's batch; if it cannot be read, the steps since `start` are kept."""
        try:
            return next(self.data)
        except Exception:
            self.read(step, 0)
            if step > start and distributed.is_alone():
                self.keep_state()
            raise

    def read(self, done: int, left: int) -> bool:
        """Takes up the numbers of all pending steps but the last `left`.

        Returns:
          Whether one of them tells to stop.
        """
        told = False
        try:
            for step, metrics in self.pending.settle(left):
                told |= bool(metrics.stop)
                self.take_up(step, metrics)
        except RefusedError as refused:
            self.stop_refused(refused)
        if not left:
            self.report.flush(done)
        return told

    def take_up(self, step: int, metrics: Metrics) -> None:
        """Counts a step's numbers, and passes its requests on."""
        self.report.add(metrics.values, metrics.shares)
        if (step + 1) % self.config.log_every == 0:
            self.report.flush(step + 1)
        wanted = step + self.method.delay
        if metrics.requests is not None and wanted < self.config.steps:
            self.data.request(wanted, np.asarray(metrics.requests))

    def run_pending_eval(self, state: TrainState) -> None:
        """Of a state that was saved but not evaluated: the evaluation that is due."""
        start = int(state.step)
        if start >= self.config.steps:
            _LOG.info("finished already: step %d of %d", start, self.config.steps)
        if start == 0 or not _is_due(self.config, start):
            return
        self.stop.has_progress = True
        scores = self.report.recorded(start, self.config.metric)
        if distributed.from_first(not scores):
            self.score(start, state)
        else:
            self.checkpointer.rank(start, scores[0] if scores else None)
        if self.stop.requested and distributed.is_alone():
            raise _interrupted(self.stop.requested, start)

    def keep(self, done: int, *, evaluating: bool, wait: bool = False) -> None:
        """Saves, then evaluates if asked to, which may fail or be ended."""
        self.read(done, 0)
        # When leaving too: a run that goes on must equal one never stopped.
        if self.recompute_bn_stats is not None and _is_due(self.config, done):
            try:
                counted = self.recompute_bn_stats(self.state)
                statistics = (counted.batch_stats, counted.ema_batch_stats)
                _check_statistics(self.parallel.fetch(statistics), done)
                self.state = counted
            except Exception:
                if distributed.is_alone():
                    self.keep_state()
                raise
        state = self.parallel.fetch(self.state)
        self.report.sync(done)
        wait |= done == self.config.steps  # what signals do ends with the loop
        self.checkpointer.save(state, self.data.get_state(), wait=wait)
        if evaluating:
            self.score(done, state)
        self.report.restart_clock()

    def score(self, done: int, state: TrainState) -> None:
        """Evaluates and reports, and ranks the checkpoint if there is a figure.

        Raises:
          Interrupted: a signal ended it; the same command makes up for it.
        """
        begin = time.monotonic()
        try:
            with self.stop.breaks() if distributed.is_alone() else nullcontext():
                numbers = self.evaluate(state)
        except Broken as broken:
            self.checkpointer.wait()
            raise _interrupted(self.stop.requested, done) from broken
        self.report.write(done, numbers)
        self.report.sync(done)
        metric, score = self.config.metric, numbers[self.config.metric]
        took = duration(time.monotonic() - begin)
        _LOG.info("step %d  %s %.4f  (%s)", done, metric, score, took)
        self.checkpointer.rank(done, score if math.isfinite(score) else None)

    def keep_state(self) -> int:
        """Saves the last good state, out of turn; returns its step."""
        one = self.parallel.fetch(self.state)
        step = int(one.step)
        self.report.flush(step)
        self.report.sync(step)
        self.checkpointer.save(one, {"next_index": step}, wait=True)
        return step

    def stop_refused(self, refused: RefusedError) -> NoReturn:
        """Saves the state before the refused step and says what happened."""
        saved, step = self.keep_state(), refused.step
        terms, index = refused.metrics.finite_names, int(refused.metrics.refused)
        if index == len(terms):
            raise RuntimeError(
                f"batch {step} met a state at step {saved}: data and state are "
                "out of order; this is a defect of the program"
            )
        raise NonFiniteError(
            f"step {step}: {terms[index]} is not finite. The update was refused and "
            f"the state before it is saved (step {saved}). Images of this step: "
            f"{self.names(refused.batch)}. Lower optimizer.lr, use "
            "model.dtype=float32, or look at these images, then start a new run"
        )


def _check_statistics(statistics: PyTree, step: int) -> None:
    """Raises NonFiniteError if batch norm's recounted statistics are not finite."""
    if not all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(statistics))
    ):
        raise NonFiniteError(
            f"step {step}: the statistics of batch norm that train.precise_bn counts "
            f"are not finite. The state before they were counted is saved (step {step})"
            ". Lower optimizer.lr, or set train.precise_bn=0, then start a new run"
        )


def _first_step(metrics: Metrics, begin: float, report: MetricWriter) -> None:
    """Waits for the first step: compilation would spoil the first images/s."""
    jax.block_until_ready(metrics)
    _LOG.info("compiled, first step done, %s", duration(time.monotonic() - begin))
    report.restart_clock(untimed=1)
