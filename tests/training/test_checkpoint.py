"""Checkpoints: what is kept, what is refused, and what damage does."""

import contextlib
import gc
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from mpmc_jax.experiments.build import init_state, state_shape
from mpmc_jax.training.checkpoint import files as checkpoint_files
from mpmc_jax.training.checkpoint import manager, orbax_logging
from mpmc_jax.training.checkpoint.integrity import CheckpointError
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.state import TrainState
from tests.support import tiny
from tests.support.json_fuzz import mutations


@pytest.fixture(scope="module")
def small():
    parts = tiny.setup(tiny.config("method=supervised"))
    return parts, init_state(parts, 0)


def _save(directory, state, steps):
    checkpointer = Checkpointer(directory, keep=2)
    for step, miou in steps:
        moved = state.replace(step=jax.numpy.asarray(step, jax.numpy.int32))
        checkpointer.save(moved, {"next_index": step})
        checkpointer.rank(step, miou)
    checkpointer.close()


def _refuse(directory, like, message, **run):
    """Asserts that no checkpoint there may be gone on with, and why."""
    checkpointer = Checkpointer(directory, **run)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.restore_latest(like)
    checkpointer.close()


def test_newest_and_best_checkpoints_are_kept(tmp_path, small):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.2)])
    assert manager.find(tmp_path, "best") == 2
    assert manager.find(tmp_path, "last") == 5
    four = manager.read(tmp_path, manager.find(tmp_path, "4"), state_shape(parts))
    assert four.data_state == {"next_index": 4} and four.step == 4
    with pytest.raises(CheckpointError, match=r"steps there: \[2, 4, 5\]"):
        manager.find(tmp_path, "3")


def test_what_is_saved_is_not_written_again(tmp_path, small):
    _, state = small
    _save(tmp_path, state, [(1, 0.1)])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _save(tmp_path, state, [(1, None)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    _save(tmp_path, state, [(1, 0.3)])
    assert json.loads((tmp_path / "1/metrics/metrics").read_text()) == {"score": 0.3}


def test_behind_an_error_a_failing_save_is_only_told(tmp_path, small, caplog):
    _, state = small

    def fail():
        raise OSError("no space")

    for error, expected in (
        (RuntimeError("the cause"), "the cause"),
        (None, "saving to .* failed: no space"),
    ):
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(state, {"next_index": 0}, wait=True)
        checkpointer._manager.close()
        checkpointer._manager.wait_until_finished = fail
        with pytest.raises(RuntimeError, match=expected), checkpointer:
            if error is not None:
                raise error
    assert "no space" in caplog.text


def test_a_lost_process_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files.distributed, "is_alone", lambda: False)
    monkeypatch.setattr(manager.distributed, "barrier", lambda name: None)
    checkpointer = Checkpointer(tmp_path)

    def lose():
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 is gone")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("the barrier failed") from error

    checkpointer._manager.close()
    checkpointer._manager.wait_until_finished = lose
    with pytest.raises(jax.errors.JaxRuntimeError, match="Task 1 is gone"):
        checkpointer.close()


@pytest.mark.full
def test_saves_leave_nothing_in_memory(tmp_path, small):
    _, state = small

    def blocks(first):
        _save(tmp_path, state, [(first + i, None) for i in range(8)])
        gc.collect()
        return sys.getallocatedblocks()

    blocks(1)
    before = blocks(11)
    # Four objects an array and a save would be what TensorStore's to_json loses.
    assert blocks(21) - before < 8 * len(jax.tree.leaves(state))


# A few bytes of a checkpoint's metadata, and what they turn into.
METADATA = {
    "position": ('"next_index": 2', '"next_index": 3'),
    "version": ("format_version", "format_vers1on"),
    "type": ("float32[", "float16["),
}


@pytest.mark.parametrize(
    "damage",
    ["array", "missing", "flipped", "metrics", "state", "position", "version", "type"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path, small, damage
):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.2)])
    step = tmp_path / "2"
    data = max(step.glob("state/**/*"), key=lambda p: p.stat().st_size * p.is_file())
    if damage == "array":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "missing":
        data.unlink()
    elif damage == "flipped":
        content = bytearray(data.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(
            255 - byte for byte in content[middle : middle + 64]
        )
        data.write_bytes(content)
    elif damage == "metrics":
        (step / "metrics" / "metrics").write_text("{")
    elif damage in METADATA:
        meta = step / "meta" / "metadata"
        before, after = METADATA[damage]
        assert before in meta.read_text()
        meta.write_text(meta.read_text().replace(before, after))
    else:
        (step / "state").rename(tmp_path / "elsewhere")
    checkpointer = Checkpointer(tmp_path)
    restored = checkpointer.restore_latest(state_shape(parts))
    checkpointer.close()
    assert restored.step == 1
    chex.assert_trees_all_equal(restored.state.params, state.params)
    assert (tmp_path / "damaged-2").is_dir()
    os.rename(tmp_path / "1", tmp_path / "damaged-1")
    with pytest.raises(CheckpointError, match=r"as damaged: \['damaged-1', 'damaged-2"):
        manager.find(tmp_path, "best")


def test_another_format_version_is_refused(tmp_path, small, monkeypatch):
    parts, state = small
    monkeypatch.setattr("mpmc_jax.training.checkpoint.manager.FORMAT_VERSION", 0)
    _save(tmp_path, state, [(1, 0.1)])
    monkeypatch.undo()
    _refuse(tmp_path, state_shape(parts), "format version 0")


def test_a_checkpoint_of_another_network_is_refused_and_left_alone(tmp_path, small):
    """Orbax alone would cut or fill arrays of another shape."""
    parts, state = small
    _save(tmp_path, state, [(1, 0.1)])
    like = state_shape(parts)
    wider = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 9), x.dtype) if x.ndim else x,
        like.params,
    )
    for other in (
        like.replace(params=wider),
        like.replace(method_state={"x": like.step}),
    ):
        _refuse(tmp_path, other, "of another network")
        with pytest.raises(CheckpointError, match="of another network"):
            manager.read(tmp_path, 1, other)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.restore_latest(like).step == 1
    checkpointer.close()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path, small):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1)])
    (tmp_path / "1" / "state").rename(tmp_path / "elsewhere")
    _refuse(tmp_path, state_shape(parts), "no checkpoint in .* can be read")


def test_reading_changes_nothing(tmp_path, small):
    parts, state = small
    with pytest.raises(CheckpointError, match="does not exist"):
        manager.find(tmp_path / "absent", "best")
    _save(tmp_path, state, [(1, 0.1), (2, 0.2), (3, 0.3)])
    unfinished = tmp_path / "4.orbax-checkpoint-tmp" / "metrics"
    unfinished.mkdir(parents=True)
    (unfinished / "metrics").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert manager.find(tmp_path, "last") == 3
    assert manager.read(tmp_path, 3, state_shape(parts)).step == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_relative_path_is_read(tmp_path, small, monkeypatch):
    """As a user types --workdir; Orbax itself takes absolute paths alone."""
    monkeypatch.chdir(tmp_path)
    parts, state = small
    directory = Path("run/checkpoints")
    directory.mkdir(parents=True)
    _save(directory, state, [(1, 0.1)])
    assert manager.find(directory, "best") == 1
    assert manager.read_run(directory, 1) == {}
    restored = manager.read(directory, 1, state_shape(parts)).state
    chex.assert_trees_all_equal(restored.params, jax.device_get(state.params))


def test_what_a_killed_run_was_saving_or_deleting_is_removed(tmp_path, small):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.2), (3, 0.3)])
    assert checkpoint_files.steps(tmp_path) == [2, 3]
    # Half deleted, and half saved.
    (tmp_path / "deleted" / "1").mkdir()
    (tmp_path / "deleted" / "1" / "rest").write_text("of it")
    (tmp_path / "4.orbax-checkpoint-tmp" / "metrics").mkdir(parents=True)
    _save(tmp_path, state, [(4, 0.4)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "deleted"]
    assert not list((tmp_path / "deleted").iterdir())


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_called_damaged(
    tmp_path, small, monkeypatch
):
    parts, state = small
    _save(tmp_path, state, [(1, 0.1), (2, 0.2)])
    read = checkpoint_files.read

    def delete_and_read(folder, **items):
        shutil.rmtree(folder)
        return read(folder, **items)

    monkeypatch.setattr(checkpoint_files, "read", delete_and_read)
    with pytest.raises(manager.CheckpointGoneError, match=r"another of \[2\]"):
        manager.read(tmp_path, 1, state_shape(parts))


def test_the_first_save_is_read_back(tmp_path, small, monkeypatch):
    _, state = small
    read = checkpoint_files.read
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:

        def fail(folder, **items):
            raise ValueError("no such array")

        patch.setattr(checkpoint_files, "read", fail)
        with pytest.raises(CheckpointError, match="cannot be read back .no such array"):
            checkpointer.save(state, {"next_index": 0})
    checkpointer.close()
    calls = []
    monkeypatch.setattr(
        checkpoint_files,
        "read",
        lambda folder, **items: [calls.append(folder.name), read(folder, **items)][1],
    )
    _save(tmp_path, state, [(1, 0.1), (2, 0.2)])
    assert set(calls) == {"1"}


@pytest.mark.parametrize("name", ["run[1]", "run*", "what?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"any of the characters \* \? \["):
        Checkpointer(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path, small):
    parts, state = small
    like = state_shape(parts)
    run = {"config": {"seed": 1, "eval": {"scales": (1.0,)}}, "data": {"crc": 7}}
    checkpointer = Checkpointer(tmp_path, run=run)
    checkpointer.save(state, {"next_index": 0}, wait=True)
    checkpointer.close()
    assert manager.read_run(tmp_path, 0)["data"] == {"crc": 7}
    checkpointer = Checkpointer(tmp_path, run=run)
    assert checkpointer.restore_latest(like).step == 0
    checkpointer.close()
    other = {**run, "data": {"crc": 8}}
    _refuse(tmp_path, like, "data.crc: 7 there, 8 now", run=other)
    assert checkpoint_files.steps(tmp_path) == [0]


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        Checkpointer(tmp_path / "file")


def _little():
    """A state of few arrays."""
    return TrainState(
        step=np.asarray(1, np.int32),
        params={"student": {"w": np.ones(3, np.float32)}},
        batch_stats={},
        ema_params=None,
        ema_batch_stats=None,
        opt_state={},
        method_state={},
        key=np.zeros(2, np.uint32),
    )


def _accepted(directory, state):
    """Asserts that what can be read there is what was saved; says whether it can."""
    accepted = 0
    with contextlib.suppress(CheckpointError):
        assert manager.find(directory, "best") == 1
        assert manager.read_run(directory, 1) == {"config": {"a": [1, None]}}
        found = manager.read(directory, 1, state)
        chex.assert_trees_all_equal(found.state, state)
        accepted += 1
    with (
        contextlib.suppress(CheckpointError),
        Checkpointer(directory, run={"config": {"a": [1, None]}}) as checkpointer,
    ):
        found = checkpointer.restore_latest(state)
        assert found.data_state == {"next_index": 1}
        chex.assert_trees_all_equal(found.state, state)
        accepted += 1
    return accepted > 0


def test_no_change_of_a_file_is_accepted_or_breaks_a_program(tmp_path):
    """JSON values of another type, bytes turned, files cut short and removed."""
    state, rng = _little(), np.random.default_rng(0)
    whole = tmp_path / "whole"
    with Checkpointer(whole, run={"config": {"a": [1, None]}}) as checkpointer:
        checkpointer.save(state, {"next_index": 1}, wait=True)
        checkpointer.rank(1, 0.5)
    changes = []
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(whole)
        changes += [(name, None), (name, b""), (name, content[: len(content) // 2])]
        turned = bytearray(content)
        turned[rng.integers(len(turned))] ^= 255
        changes.append((name, bytes(turned)))
        if content.startswith(b"{"):
            changes += [
                (name, text.encode()) for _, text in mutations(content.decode())
            ]
            changes.append((name, b"[" * 100_000))
    refused = 0
    for number, (name, content) in enumerate(changes):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_bytes(content)
        refused += not _accepted(directory, state)
        shutil.rmtree(directory)
    assert refused > len(changes) / 3


def test_orbax_does_not_remark_on_a_save_that_waits_for_the_previous_one(caplog):
    orbax_logging.silence_noise()
    logger = logging.getLogger("absl")
    logger.warning("Waiting for previous save to complete took %f seconds.", 1.6)
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
