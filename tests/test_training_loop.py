"""The loop: resuming, stopping, refusing, and what it writes."""

import json
import logging
import os
import signal

import chex
import jax
import numpy as np
import pytest
import tiny

from mpmc_jax.training import loop, report, workdir
from mpmc_jax.training.build import init_state, state_shape
from mpmc_jax.training.checkpoint import Checkpointer, CheckpointError
from mpmc_jax.training.parallel import Layout, Parallel


class Batches:
    """Toy batches from a step on; may do something before one of them."""

    def __init__(self, cfg, method, start, before=lambda step: None):
        self.cfg, self.method, self.step, self.before = cfg, method, start, before

    def __next__(self):
        self.before(self.step)
        self.step += 1
        return tiny.batch(self.step - 1, self.cfg, self.method)

    def get_state(self):
        return {"next_index": self.step}

    def close(self):
        pass


def go(cfg, directory, steps, before=lambda step: None):
    """Trains, or goes on, to `steps`; returns the last state."""
    parts = tiny.setup(cfg)
    checkpointer = Checkpointer(directory / "checkpoints", keep=2)
    restored = checkpointer.restore_latest(state_shape(parts))
    state = restored.state if restored else init_state(parts, cfg.seed)
    start = int(state.step)
    reporter = report.Report(directory, start, steps, cfg.train.batch_size)
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    try:
        return loop.train(
            loop.LoopConfig(steps, log_every=1, eval_every=3, checkpoint_every=3),
            parts.step,
            Parallel("pmap", layout, jax.devices()[:1]),
            state,
            Batches(cfg, parts.method, start, before),
            evaluate=lambda state: {"val/miou": float(state.step) / 10},
            checkpointer=checkpointer,
            report=reporter,
            names=lambda batch: {"labeled": [f"id{i}" for i in batch.labeled.index]},
        )
    finally:
        reporter.close()
        checkpointer.close()


def test_going_on_from_a_checkpoint_equals_never_having_stopped(tmp_path):
    cfg = tiny.config("method=mean_teacher,mpmc=recommended")
    whole = go(cfg, tmp_path / "whole", 6)
    go(cfg, tmp_path / "halves", 3)
    halves = go(cfg, tmp_path / "halves", 6)
    chex.assert_trees_all_equal(halves.replace(key=None), whole.replace(key=None))
    lines = [
        json.loads(line)
        for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()
    ]
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
    chex.assert_trees_all_equal(stopped.replace(key=None), whole.replace(key=None))


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


@pytest.fixture(scope="module")
def small():
    parts = tiny.setup(tiny.config("method=supervised"))
    return parts, init_state(parts, 0)


def _save(directory, state, steps):
    checkpointer = Checkpointer(directory, keep=2)
    for step, miou in steps:
        moved = state.replace(step=jax.numpy.asarray(step, jax.numpy.int32))
        checkpointer.save(moved, {"next_index": step}, miou, wait=True)
    checkpointer.close()


def test_newest_and_best_checkpoints_are_kept(tmp_path, small):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.2)])
    checkpointer = Checkpointer(tmp_path)
    like = state_shape(parts)
    assert checkpointer.restore("best", like).step == 2
    assert checkpointer.restore("last", like).step == 5
    assert checkpointer.restore("4", like).data_state == {"next_index": 4}
    with pytest.raises(CheckpointError, match=r"steps there: \[2, 4, 5\]"):
        checkpointer.restore("3", like)
    checkpointer.close()


@pytest.mark.parametrize("damage", ["array", "flipped", "metrics", "state"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path, small, damage
):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.2)])
    step = tmp_path / "2"
    data = max(step.glob("state/**/*"), key=lambda p: p.stat().st_size * p.is_file())
    if damage == "array":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "flipped":
        content = bytearray(data.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(
            255 - byte for byte in content[middle : middle + 64]
        )
        data.write_bytes(content)
    elif damage == "metrics":
        (step / "metrics" / "metrics").write_text("{")
    else:
        (step / "state").rename(tmp_path / "elsewhere")
    checkpointer = Checkpointer(tmp_path)
    restored = checkpointer.restore_latest(state_shape(parts))
    checkpointer.close()
    assert restored.step == 1
    chex.assert_trees_all_equal(restored.state.params, state.params)
    assert (tmp_path / "damaged-2").is_dir()


def test_another_format_version_is_refused(tmp_path, small, monkeypatch):
    parts, state = small
    monkeypatch.setattr("mpmc_jax.training.checkpoint.FORMAT_VERSION", 0)
    _save(tmp_path, state, [(1, 0.1)])
    monkeypatch.undo()
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="format version 0"):
        checkpointer.restore_latest(state_shape(parts))
    checkpointer.close()


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        Checkpointer(tmp_path / "file")


def test_a_workdir_of_another_run_is_refused_with_the_difference(tmp_path):
    cfg = tiny.config("method=supervised", optimizer__lr=0.01)
    workdir.claim(tmp_path, cfg)
    workdir.claim(tmp_path, cfg)
    other = tiny.config("method=supervised", optimizer__lr=0.5)
    with pytest.raises(workdir.WorkdirError) as caught:
        workdir.claim(tmp_path, other)
    assert "optimizer.lr: 0.01 there, 0.5 now" in str(caught.value)
    other = tiny.config("method=supervised")
    with other.unlocked():
        other.format_version = 0
    with pytest.raises(workdir.WorkdirError, match="format_version 1"):
        workdir.claim(tmp_path, other)
    with pytest.raises(workdir.WorkdirError, match="holds no run"):
        workdir.load(tmp_path / "nothing", cfg)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(workdir.WorkdirError, match="damaged"):
        workdir.load(tmp_path, cfg)


def test_metrics_are_json_and_resume_drops_later_lines(tmp_path, caplog):
    first = report.Report(tmp_path, 0, 10, batch_size=4)
    for step in (1, 2, 3):
        first.add({"loss": float(step), "lr": 0.1})
        first.flush(step)
    first.write(3, {"val/miou": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')  # cut short by a kill
    second = report.Report(tmp_path, 2, 10, batch_size=4)
    with caplog.at_level(logging.INFO):
        second.add({"loss": 1.0, "lr": 0.1})
        second.flush(3)
    second.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train/loss"] == 1.0
