"""The loop: resuming, stopping, refusing, and what it writes."""

import contextlib
import json
import logging
import os
import signal
import time

import chex
import jax
import numpy as np
import pytest

from mpmc_jax import distributed
from mpmc_jax.experiments.build import init_state, state_shape
from mpmc_jax.training import loop, metric_writer
from mpmc_jax.training.checkpoint import manager
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.parallel import Layout, Parallel
from tests.support import tiny
from tests.support.programs import read_metrics


class Batches:
    """Toy batches from a step on; may do something before one of them."""

    def __init__(self, cfg, method, start, before=lambda step: None):
        self.cfg, self.method, self.step, self.before = cfg, method, start, before

    def __next__(self):
        self.before(self.step)
        self.step += 1
        return tiny.batch(self.step - 1, self.cfg, self.method)

    def request(self, step, images):
        raise AssertionError("only AEL requests images")

    def get_state(self):
        return {"next_index": self.step}

    def close(self):
        pass


class _OneStep(Parallel):
    """Compiles a configuration's step for the first run of it, and for all others."""

    compiled = {}

    def __init__(self, cfg):
        layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
        super().__init__("pmap", layout, 1)
        self._name = str(cfg)

    def compile(self, step):
        return self.compiled.setdefault(self._name, super().compile(step))


def score(state):
    return {"val/miou": float(state.step) / 10}


def go(
    cfg,
    directory,
    steps,
    before=lambda step: None,
    evaluate=score,
    log_every=1,
    recompute_bn_stats=None,
    patience=0,
    panels=None,
):
    """Trains, or goes on, to `steps`; returns the last state."""
    directory.mkdir(exist_ok=True)
    parts = tiny.setup(cfg)
    checkpointer = Checkpointer(directory / "checkpoints", keep=2)
    restored = checkpointer.restore_latest(state_shape(parts))
    state = restored.state if restored else init_state(parts, cfg.seed)
    start = int(state.step)
    reporter = metric_writer.MetricWriter(directory, start, steps, cfg.train.batch_size)
    parallel = _OneStep(cfg)
    with contextlib.closing(reporter), checkpointer:
        return loop.train(
            loop.LoopConfig(
                steps, log_every, eval_every=3, checkpoint_every=3, patience=patience
            ),
            parts.step,
            parallel,
            state,
            Batches(cfg, parts.step.method, start, before),
            evaluate=evaluate,
            checkpointer=checkpointer,
            report=reporter,
            names=lambda batch: {"labeled": [f"id{i}" for i in batch.labeled.index]},
            place=parallel.place,
            recompute_bn_stats=recompute_bn_stats,
            panels=panels,
        )


@pytest.mark.full
def test_going_on_from_a_checkpoint_equals_never_having_stopped(tmp_path):
    cfg = tiny.config("method=mean_teacher,mpmc=recommended")
    whole = go(cfg, tmp_path / "whole", 6)
    go(cfg, tmp_path / "halves", 3)
    halves = go(cfg, tmp_path / "halves", 6)
    chex.assert_trees_all_equal(halves, whole)
    lines = read_metrics(tmp_path / "halves")
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert sorted(trained) == sorted(set(trained))
    assert [line["step"] for line in lines if "val/miou" in line] == [3, 6]


def test_a_stop_request_saves_and_the_run_goes_on(tmp_path):
    cfg = tiny.config("method=supervised")

    def stop(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted, match="SIGTERM at step 2"):
        go(cfg, tmp_path / "stopped", 4, stop)
    stopped = go(cfg, tmp_path / "stopped", 4)
    whole = go(cfg, tmp_path / "whole", 4)
    chex.assert_trees_all_equal(stopped, whole)


def test_panels_are_drawn_after_each_evaluation(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        metric_writer.MetricWriter,
        "write_pictures",
        lambda self, step, pictures: written.append((step, pictures)),
    )

    def panels(state):
        return {"panels/a": int(state.step)}

    go(tiny.config("method=supervised"), tmp_path / "run", 6, panels=panels)
    assert written == [(3, {"panels/a": 3}), (6, {"panels/a": 6})]


def test_panels_that_cannot_be_drawn_end_no_run(tmp_path, caplog):
    drawn = []

    def panels(state):
        drawn.append(int(state.step))
        raise OSError("a.png: truncated\nat all")

    with caplog.at_level(logging.WARNING):
        state = go(tiny.config("method=supervised"), tmp_path / "run", 6, panels=panels)
    assert int(state.step) == 6 and drawn == [3]
    said = [record.getMessage() for record in caplog.records]
    assert [x for x in said if "panels" in x] == [
        "no panels from step 3 on (train.panels): a.png: truncated"
    ]


@pytest.mark.parametrize("how", ["stops before", "killed behind its line", "fails"])
def test_an_evaluation_that_is_ended_or_left_out_is_made_up_for(tmp_path, how):
    cfg = tiny.config("method=supervised")

    def stop(step):
        if how == "stops before" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(state):
        if how == "fails" and int(state.step) == 6:
            raise OSError("no such image")
        return score(state)

    def rank(self, step, figure):
        if how == "killed behind its line" and step == 3:
            raise KeyboardInterrupt
        ranked(self, step, figure)

    ranked = Checkpointer.rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "rank", rank)
        with pytest.raises((loop.Interrupted, KeyboardInterrupt, OSError)):
            go(cfg, tmp_path / "ended", 6, stop, evaluate)
    go(cfg, tmp_path / "ended", 6)
    lines = [line for line in read_metrics(tmp_path / "ended") if "val/miou" in line]
    assert [(line["step"], line["val/miou"]) for line in lines] == [(3, 0.3), (6, 0.6)]
    for step in (3, 6):
        text = tmp_path / "ended" / "checkpoints" / str(step) / "metrics" / "metrics"
        assert json.loads(text.read_text()) == {"score": step / 10}


def test_a_stop_where_statistics_are_recounted_changes_nothing(tmp_path):
    cfg = tiny.config("method=supervised")
    calls = []

    def halve(state):
        calls.append(1)
        return state.replace(
            batch_stats=jax.tree.map(lambda x: x / 2, state.batch_stats)
        )

    def stop(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted, match="SIGTERM at step 3"):
        go(cfg, tmp_path / "stopped", 6, stop, recompute_bn_stats=halve)
    stopped = go(cfg, tmp_path / "stopped", 6, recompute_bn_stats=halve)
    whole = go(cfg, tmp_path / "whole", 6, recompute_bn_stats=halve)
    chex.assert_trees_all_equal(stopped, whole)
    assert len(calls) == 4  # before the evaluations at 3 and 6, twice


@pytest.mark.parametrize("failing", ["evaluate", "recompute_bn_stats"])
def test_a_failing_evaluation_or_recount_loses_no_step(tmp_path, failing):
    cfg = tiny.config("method=supervised")

    def fail(state):
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        go(cfg, tmp_path, 3, **{failing: fail})
    assert manager.find(tmp_path / "checkpoints", "last") == 3


def test_a_stop_ends_an_evaluation_and_the_last_one_is_made_up_for(tmp_path):
    cfg = tiny.config("method=supervised")

    def slow(state):
        if int(state.step) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return score(state)

    begin = time.monotonic()
    with pytest.raises(loop.Interrupted, match="SIGTERM at step 6, which is saved"):
        go(cfg, tmp_path, 6, evaluate=slow)
    assert time.monotonic() - begin < 60

    def saved_scores():
        lines = [line for line in read_metrics(tmp_path) if "val/miou" in line]
        return [line["step"] for line in lines]

    assert saved_scores() == [3]
    state = go(cfg, tmp_path, 6)
    assert int(state.step) == 6 and saved_scores() == [3, 6]
    assert int(go(cfg, tmp_path, 6).step) == 6 and saved_scores() == [3, 6]
    saved = tmp_path / "checkpoints"
    assert manager.find(saved, "best") == 6
    restored = manager.read(saved, 6, state_shape(tiny.setup(cfg)))
    chex.assert_trees_all_equal(restored.state, state)


def _falling(state):
    """The best score is that of the second evaluation, at step 6."""
    values = {3: 0.2, 6: 0.5, 9: 0.5, 12: 0.4}
    return {"val/miou": values[int(state.step)]}


def test_patience_survives_restarts_and_keeps_the_best(tmp_path, caplog):
    cfg = tiny.config("method=supervised")
    caplog.set_level("INFO")
    whole = go(cfg, tmp_path / "whole", 15, evaluate=_falling, patience=2)
    assert int(whole.step) == 12
    message = "ending at step 12 of 15: no higher val/miou in 2 evaluations"
    assert message in caplog.text

    def stop(step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    place = tmp_path / "stopped"
    with pytest.raises(loop.Interrupted, match="at step 9"):
        go(cfg, place, 15, stop, evaluate=_falling, patience=2)
    caplog.clear()
    # Before it trains on, the evaluation at step 9 is run, the first without success.
    again = go(cfg, place, 15, evaluate=_falling, patience=2)
    chex.assert_trees_all_equal(again, whole)
    assert message in caplog.text
    assert manager.find(place / "checkpoints", "best") == 9  # the later one of equals
    # The same command again trains nothing, and a longer patience trains on.
    assert int(go(cfg, place, 15, evaluate=_falling, patience=2).step) == 12
    patient = {"evaluate": lambda state: {"val/miou": 0.1}, "patience": 3}
    assert int(go(cfg, place, 15, **patient).step) == 15


def test_an_evaluation_without_the_score_ranks_lowest(tmp_path):
    def evaluate(state):
        return (
            {"val/miou": 0.1} if int(state.step) == 3 else {"val/pixel_accuracy": 1.0}
        )

    go(tiny.config("method=supervised"), tmp_path, 6, evaluate=evaluate)
    assert manager.find(tmp_path / "checkpoints", "best") == 3


def test_patience_is_decided_by_process_0(tmp_path, monkeypatch):
    """The others have no metrics.jsonl."""
    monkeypatch.setattr(metric_writer.MetricWriter, "history", lambda self, name: [])
    monkeypatch.setattr(distributed, "from_first", lambda number: number or 1)
    state = go(tiny.config("method=supervised"), tmp_path, 6, patience=1)
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("scores", "since"),
    [
        ([], 0),
        ([0.1], 0),
        ([0.1, 0.2, 0.2], 1),
        ([0.3, 0.1, 0.2], 2),
        ([None, None], 2),
        ([None, 0.1, None], 1),
        ([float("nan"), 0.0], 0),
    ],
)
def test_evaluations_since_the_best_one(scores, since):
    assert loop.evaluations_since_best(scores) == since


def test_what_was_trained_before_a_batch_that_cannot_be_read_is_kept(tmp_path):
    cfg = tiny.config("method=supervised")

    def fail(step):
        if step == 4:
            raise ValueError("record 'a' cannot be read")

    with pytest.raises(ValueError, match="record 'a'"):
        go(cfg, tmp_path, 6, before=fail, log_every=10)
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in lines] == [3, 4]
    halves, whole = go(cfg, tmp_path, 6), go(cfg, tmp_path / "whole", 6)
    chex.assert_trees_all_equal(halves, whole)


def test_every_step_is_in_one_line(tmp_path, monkeypatch):
    """A line ends at multiples of log_every and at evaluations, and nowhere else."""
    losses = []
    add = metric_writer.MetricWriter.add

    def spy(self, values, shares):
        losses.append(float(values["loss"]))
        add(self, values, shares)

    monkeypatch.setattr(metric_writer.MetricWriter, "add", spy)
    go(tiny.config("method=supervised"), tmp_path, 6, log_every=4)
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 6]
    means = [np.mean(losses[:3]), losses[3], np.mean(losses[4:])]
    np.testing.assert_allclose([line["train/loss"] for line in lines], means, rtol=1e-6)


@pytest.mark.parametrize("field", ["steps", "log_every", "eval_every"])
def test_a_rhythm_of_no_step_is_refused(field):
    rhythm = dict.fromkeys(("steps", "log_every", "eval_every", "checkpoint_every"), 1)
    with pytest.raises(ValueError, match=f"train.{field}=0"):
        loop.LoopConfig(**rhythm | {field: 0})


def test_a_negative_patience_is_refused():
    with pytest.raises(ValueError, match="train.patience=-1: the number of evaluat"):
        loop.LoopConfig(1, 1, 1, 1, patience=-1)


def test_a_number_that_is_not_finite_stops_with_step_term_and_ids(tmp_path):
    cfg = tiny.config("method=supervised", optimizer__lr=1e30)
    with pytest.raises(loop.NonFiniteError) as caught:
        go(cfg, tmp_path, 10, log_every=100)
    message = str(caught.value)
    assert "is not finite" in message and "id" in message
    saved = tmp_path / "checkpoints"
    last = manager.find(saved, "last")
    state = manager.read(saved, last, state_shape(tiny.setup(cfg))).state
    assert f"saved (step {int(state.step)})" in message
    # The steps before it, whose line was not due, are told all the same.
    assert read_metrics(tmp_path)[-1]["step"] == int(state.step) >= 1
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)):
        assert np.isfinite(leaf).all()


def test_recounted_statistics_that_are_not_finite_are_not_saved(tmp_path):
    cfg = tiny.config("method=supervised")

    def recompute_bn_stats(state):
        return state.replace(
            batch_stats=jax.tree.map(lambda x: x / 0, state.batch_stats)
        )

    with pytest.raises(
        loop.NonFiniteError, match=r"step 3: .*train.precise_bn.*step 3"
    ):
        go(cfg, tmp_path, 6, recompute_bn_stats=recompute_bn_stats)
    directory = tmp_path / "checkpoints"
    last = manager.find(directory, "last")
    state = manager.read(directory, last, state_shape(tiny.setup(cfg))).state
    assert state.step == 3
    for leaf in jax.tree.leaves(state.batch_stats):
        assert np.isfinite(leaf).all()
