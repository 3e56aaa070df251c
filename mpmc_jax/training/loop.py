"""The training loop: the only one, for every method, data set and device kind.

It never waits for the step it has just started: metrics are read `METRICS_LAG` steps
later.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from mpmc_jax import distributed
from mpmc_jax.methods.base import Method
from mpmc_jax.text import first_line, quantity
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.compiled_steps import Programs
from mpmc_jax.training.config import METRICS_LAG, StepConfig
from mpmc_jax.training.metric_writer import MetricWriter, Picture, duration
from mpmc_jax.training.metrics_queue import Pending, SkippedUpdateError
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.signals import BlockInterrupted, StopRequest
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import IN_ORDER, Metrics, make_step_info
from mpmc_jax.types import Batch, PyTree

_LOG = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A number of a step was not finite; the state before that step is saved."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its state is saved."""


class DataIterator(Protocol):
    """Iterates over batches from a position on; the position is the step."""

    def __next__(self) -> Batch: ...

    def request(self, step: int, images: np.ndarray) -> None:
        """Requests the partner images of a later step."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was returned."""
        ...

    def close(self) -> None:
        """Ends the reading threads."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length and intervals of a run in steps, and the metric that ranks checkpoints.

    With `patience` the run ends after so many evaluations in a row without a higher
    value of the metric; 0 never ends it early.
    """

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    metric: str = "val/miou"
    patience: int = 0

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ValueError(
                f"train.patience={self.patience}: the number of evaluations without "
                "improvement after which the run ends, or 0 for none"
            )
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
    panels: Callable[[TrainState], Mapping[str, Picture]] | None = None,
) -> TrainState:
    """Trains from `state` (on the host) until the run ends; returns the last state.

    Args:
      evaluate: metrics of an unreplicated state, `config.metric` where it is defined.
      names: returns the ids of a batch's images, for messages.
      recompute_bn_stats: gives a replicated state new statistics, which it keeps.
      panels: draws predictions of one copy of the state, after each evaluation.

    Raises:
      NonFiniteError: the update was skipped; the state before it is saved.
      Interrupted: a signal came, here or to another process; the state is saved.
    """
    start = int(state.step)
    callbacks = evaluate, checkpointer, report, names, recompute_bn_stats, panels
    run = _Run(config, step_config.method, parallel, data, *callbacks)
    programs = Programs(parallel, step_config)
    run.request_first(state)
    run.state = parallel.replicate(state)
    with run.stop as stop:
        run.run_pending_eval(state)
        for step in run.steps(start):
            batch = run.next_batch(step, start)
            begin, is_first = time.monotonic(), programs.needs_compiling(step)
            stop.has_progress = not is_first  # else a signal ends the process at once
            step_info = parallel.replicate(make_step_info(step, bool(stop.requested)))
            run.state, metrics = programs.get(step)(run.state, place(batch), step_info)
            if is_first:
                _first_step(metrics, begin, report)
            stop.has_progress = True
            run.pending.add(step, parallel.start_reading(metrics), batch)
            done = step + 1
            # Several processes stop after the step whose metrics report the request.
            at_once = distributed.is_alone() and bool(stop.requested)
            # All is saved before the next phase compiles: a signal ends a compilation.
            phase_ends = programs.begins_phase(done)
            is_save_step = at_once or phase_ends or _is_save_due(config, done)
            stop_seen = run.read(done, 0 if is_save_step else METRICS_LAG)
            leaving = (at_once or stop_seen) and done < config.steps
            if is_save_step or leaving:
                # A stop request leaves no time for an evaluation.
                evaluating = _is_eval_due(config, done) and not leaving
                run.save_and_evaluate(done, evaluating, wait=phase_ends or leaving)
            if leaving:
                raise _interrupted(stop.requested or "another process", done)
    return parallel.fetch(run.state)


def _interrupted(by: str, step: int) -> Interrupted:
    return Interrupted(
        f"stopped by {by} at step {step}, which is saved; the same command resumes "
        "from there"
    )


def _is_save_due(config: LoopConfig, done: int) -> bool:
    """Whether a checkpoint or an evaluation is due after `done` steps."""
    return _is_eval_due(config, done) or done % config.checkpoint_every == 0


def _is_eval_due(config: LoopConfig, done: int) -> bool:
    """Whether an evaluation is due after `done` steps."""
    return done % config.eval_every == 0 or done == config.steps


def evaluations_since_best(scores: Sequence[float | None]) -> int:
    """Returns how many evaluations came after the first one with the highest score.

    A score that is not a number is no improvement: None, or NaN.
    """
    best, since = -math.inf, 0
    for score in scores:
        since += 1
        if score is not None and score > best:
            best, since = score, 0
    return since


@dataclasses.dataclass
class _Run:
    """A run in progress: its state on the devices, and what reads and saves it.

    `pending` are the steps whose metrics are not read yet.
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
    panels: Callable[[TrainState], Mapping[str, Picture]] | None
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    pending: Pending = dataclasses.field(default_factory=Pending)
    state: Any = None

    def request_first(self, state: TrainState) -> None:
        """Requests the partners that the last steps before this state chose."""
        start, delay = int(state.step), self.method.delay
        for step in range(start, min(start + delay, self.config.steps)):
            images = self.method.requested(state.method_state, step)
            self.data.request(step, np.asarray(images))

    def next_batch(self, step: int, start: int) -> Batch:
        """Returns a step's batch; if it cannot be read, saves the state before it."""
        try:
            return next(self.data)
        except Exception:
            self.read(step, 0)
            if step > start and distributed.is_alone():
                self.save_last_good_state()
            raise

    def read(self, done: int, left: int) -> bool:
        """Processes the metrics of all pending steps but the last `left`.

        Returns:
          Whether one of them reports a request to stop.
        """
        stop_seen = False
        try:
            for step, metrics in self.pending.read_oldest(left):
                stop_seen |= bool(metrics.stop)
                self.process(step, metrics)
        except SkippedUpdateError as skipped:
            self.stop_skipped(skipped)
        if not left:
            self.report.flush(done)
        return stop_seen

    def process(self, step: int, metrics: Metrics) -> None:
        """Reports a step's metrics, and passes its requests on to the data."""
        self.report.add(metrics.values, metrics.shares)
        if (step + 1) % self.config.log_every == 0:
            self.report.flush(step + 1)
        wanted = step + self.method.delay
        if metrics.requests is not None and wanted < self.config.steps:
            self.data.request(wanted, np.asarray(metrics.requests))

    def run_pending_eval(self, state: TrainState) -> None:
        """Runs the evaluation that a stopped run still owes."""
        start = int(state.step)
        if start >= self.config.steps:
            _LOG.info("finished already: step %d of %d", start, self.config.steps)
        if start == 0 or not _is_eval_due(self.config, start):
            return
        self.stop.has_progress = True
        scores = self.report.written(start, self.config.metric)
        if distributed.from_first(not scores):
            self.score(start, state)
        else:
            self.checkpointer.rank(start, scores[0] if scores else None)
        if self.stop.requested and distributed.is_alone():
            raise _interrupted(self.stop.requested, start)

    def steps(self, start: int) -> Iterator[int]:
        """Yields the steps to make, up to the last one or until scores stall."""
        for step in range(start, self.config.steps):
            if self.has_stalled(step):
                return
            yield step

    def has_stalled(self, done: int) -> bool:
        """Whether the run ends after `done` steps because its scores do not improve.

        The scores are those in metrics.jsonl, so that a restart changes nothing.
        """
        patience = self.config.patience
        if not patience or done == 0 or not _is_eval_due(self.config, done):
            return False
        scores = self.report.history(self.config.metric)
        stalled = distributed.from_first(evaluations_since_best(scores))
        if stalled >= patience:
            _LOG.info(
                "ending at step %d of %d: no higher %s in %s (train.patience)",
                done,
                self.config.steps,
                self.config.metric,
                quantity(stalled, "evaluation"),
            )
        return stalled >= patience

    def save_and_evaluate(
        self, done: int, evaluating: bool, *, wait: bool = False
    ) -> None:
        """Saves the state and then evaluates it, if asked to.

        Saving comes first because an evaluation may fail or be interrupted. Before it,
        batch-norm statistics are recomputed where an evaluation is due.
        """
        self.read(done, 0)
        # When leaving too: a resumed run must equal one that was never stopped.
        if self.recompute_bn_stats is not None and _is_eval_due(self.config, done):
            try:
                recomputed = self.recompute_bn_stats(self.state)
                statistics = (recomputed.batch_stats, recomputed.ema_batch_stats)
                _check_statistics(self.parallel.fetch(statistics), done)
                self.state = recomputed
            except Exception:
                if distributed.is_alone():
                    self.save_last_good_state()
                raise
        state = self.parallel.fetch(self.state)
        self.report.sync(done)
        wait |= done == self.config.steps  # signals are handled until the loop ends
        self.checkpointer.save(state, self.data.get_state(), wait=wait)
        if evaluating:
            self.score(done, state)
        self.report.restart_clock()

    def score(self, done: int, state: TrainState) -> None:
        """Evaluates and reports the scores, and ranks the checkpoint by one of them.

        Raises:
          Interrupted: a signal ended the evaluation; the same command runs it again.
        """
        begin = time.monotonic()
        try:
            alone = distributed.is_alone()
            with self.stop.interruptible() if alone else nullcontext():
                scores = {self.config.metric: math.nan, **self.evaluate(state)}
        except BlockInterrupted as interrupted:
            self.checkpointer.wait()
            raise _interrupted(self.stop.requested, done) from interrupted
        self.report.write(done, scores)
        self.report.sync(done)
        metric = self.config.metric
        # A class that is neither there nor predicted, as in center crops, has no score.
        score = scores[metric]
        took = duration(time.monotonic() - begin)
        _LOG.info("step %d  %s %.4f  (%s)", done, metric, score, took)
        self.checkpointer.rank(done, score if math.isfinite(score) else None)
        self.draw_panels(done, state)

    def draw_panels(self, done: int, state: TrainState) -> None:
        """Draws and writes the panels; after an error, warns and draws no more."""
        if self.panels is None or not distributed.is_first():
            return
        try:
            pictures = self.panels(state)
        # An image that cannot be read, or memory: training needs no pictures.
        except Exception as error:
            self.panels = None
            _LOG.warning(
                "no panels from step %d on (train.panels): %s", done, first_line(error)
            )
            return
        self.report.write_pictures(done, pictures)

    def save_last_good_state(self) -> int:
        """Saves the state of the devices, at any step; returns its step."""
        state = self.parallel.fetch(self.state)
        step = int(state.step)
        self.report.flush(step)
        self.report.sync(step)
        self.checkpointer.save(state, {"next_index": step}, wait=True)
        return step

    def stop_skipped(self, skipped: SkippedUpdateError) -> NoReturn:
        """Saves the state before the skipped step and raises what happened.

        Raises:
          NonFiniteError: a number of the step was not finite.
          RuntimeError: batch and state were out of order.
        """
        saved, step = self.save_last_good_state(), skipped.step
        check = skipped.metrics.failed_check
        if check == IN_ORDER:
            raise RuntimeError(
                f"batch {step} came to a state at step {saved}: data and state are "
                "out of order; this is a defect of the program"
            )
        raise NonFiniteError(
            f"step {step}: {check} is not finite. The update was skipped and "
            f"the state before it is saved (step {saved}). Images of this step: "
            f"{self.names(skipped.batch)}. Lower optimizer.lr, use "
            "model.dtype=float32, or look at these images, then start a new run"
        )


def _check_statistics(statistics: PyTree, step: int) -> None:
    """Raises NonFiniteError if recomputed batch-norm statistics are not finite."""
    if not all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(statistics))
    ):
        raise NonFiniteError(
            f"step {step}: the batch-norm statistics that train.precise_bn recomputed "
            f"are not finite. The state before that is saved (step {step}). Lower "
            "optimizer.lr, or set train.precise_bn=0, then start a new run"
        )


def _first_step(metrics: Metrics, begin: float, report: MetricWriter) -> None:
    """Waits for the first step: compilation would distort the first images/s."""
    jax.block_until_ready(metrics)
    _LOG.info("compiled, first step done, %s", duration(time.monotonic() - begin))
    report.restart_clock(untimed=1)
