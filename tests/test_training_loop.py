"""The loop: resuming, stopping, refusing, and what it writes."""

import json
import logging
import os
import signal
import time

import chex
import jax
import numpy as np
import pytest
import tiny

from mpmc_jax.training import loop, report
from mpmc_jax.training.build import init_state, state_shape
from mpmc_jax.training.checkpoint import Checkpointer
from mpmc_jax.training.parallel import Layout, Parallel


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


def score(state):
    return {"val/miou": float(state.step) / 10}


def go(
    cfg,
    directory,
    steps,
    before=lambda step: None,
    evaluate=score,
    log_every=1,
    recount=None,
):
    """Trains, or goes on, to `steps`; returns the last state."""
    directory.mkdir(exist_ok=True)
    parts = tiny.setup(cfg)
    checkpointer = Checkpointer(directory / "checkpoints", keep=2)
    restored = checkpointer.restore_latest(state_shape(parts))
    state = restored.state if restored else init_state(parts, cfg.seed)
    start = int(state.step)
    reporter = report.Report(directory, start, steps, cfg.train.batch_size)
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel("pmap", layout, 1)
    try:
        return loop.train(
            loop.LoopConfig(steps, log_every, eval_every=3, checkpoint_every=3),
            parts.step,
            parallel,
            state,
            Batches(cfg, parts.method, start, before),
            evaluate=evaluate,
            checkpointer=checkpointer,
            report=reporter,
            names=lambda batch: {"labeled": [f"id{i}" for i in batch.labeled.index]},
            place=parallel.place,
            recount=recount,
        )
    finally:
        reporter.close()
        checkpointer.close()


def read_metrics(directory):
    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


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
        go(cfg, tmp_path / "stopped", 6, stop, recount=halve)
    stopped = go(cfg, tmp_path / "stopped", 6, recount=halve)
    whole = go(cfg, tmp_path / "whole", 6, recount=halve)
    chex.assert_trees_all_equal(stopped, whole)
    assert len(calls) == 4  # before the evaluations at 3 and 6, twice


@pytest.mark.parametrize("failing", ["evaluate", "recount"])
def test_a_failing_evaluation_or_recount_loses_no_step(tmp_path, failing):
    cfg = tiny.config("method=supervised")

    def fail(state):
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        go(cfg, tmp_path, 3, **{failing: fail})
    checkpointer = Checkpointer(tmp_path / "checkpoints", read_only=True)
    assert checkpointer.restore("last", state_shape(tiny.setup(cfg))).step == 3
    checkpointer.close()


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
    checkpointer = Checkpointer(tmp_path / "checkpoints", read_only=True)
    like = state_shape(tiny.setup(cfg))
    assert checkpointer.restore("best", like).step == 6
    chex.assert_trees_all_equal(checkpointer.restore("best", like).state, state)
    checkpointer.close()


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
    add = report.Report.add

    def spy(self, values):
        losses.append(float(values["loss"]))
        add(self, values)

    monkeypatch.setattr(report.Report, "add", spy)
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


def test_a_number_that_is_not_finite_stops_with_step_term_and_ids(tmp_path):
    cfg = tiny.config("method=supervised", optimizer__lr=1e30)
    with pytest.raises(loop.NonFiniteError) as caught:
        go(cfg, tmp_path, 10)
    message = str(caught.value)
    assert "is not finite" in message and "id" in message
    saved = Checkpointer(tmp_path / "checkpoints")
    state = saved.restore("last", state_shape(tiny.setup(cfg))).state
    saved.close()
    assert f"saved (step {int(state.step)})" in message
    for leaf in jax.tree.leaves(state.batch_stats):
        assert np.isfinite(leaf).all()


def test_a_step_that_compiled_makes_no_speed(tmp_path):
    made = report.Report(tmp_path, 0, 10, images=4)
    made.restart_clock(untimed=1)
    for step in (1, 2):
        made.add({"loss": 1.0, "lr": 0.1})
        made.flush(step)
    made.close()
    first, second = read_metrics(tmp_path)
    assert "train/images_per_second" not in first
    assert second["train/images_per_second"] > 0


def test_metrics_are_json_and_resume_drops_later_lines(tmp_path, caplog):
    first = report.Report(tmp_path, 0, 10, images=4)
    for step in (1, 2, 3):
        first.add({"loss": float(step), "lr": 0.1})
        first.flush(step)
    first.write(3, {"val/miou": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')  # cut short by a kill
    second = report.Report(tmp_path, 2, 10, images=4)
    with caplog.at_level(logging.INFO):
        second.add({"loss": 1.0, "lr": 0.1})
        second.flush(3)
    second.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train/loss"] == 1.0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_full_disk_names_the_file_and_loses_no_line_before(tmp_path):
    def begin(start):
        return report.Report(tmp_path, start, steps=5, images=4)

    reporter = begin(0)
    reporter.write(1, {"train/loss": 2.0})
    written = reporter._file
    message = r"metrics\.jsonl: step 2 .* No space .* same command again"
    with written, open("/dev/full", "a") as full:
        reporter._file = full
        with pytest.raises(OSError, match=message):
            reporter.write(2, {"train/loss": 1.0})
        reporter.close()
    again = begin(1)
    again.write(2, {"train/loss": 1.0})
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
