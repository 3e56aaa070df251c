"""Checkpoints: what is kept, what is refused, and what damage does."""

import gc
import json
import os
import sys

import chex
import jax
import pytest
import tiny

from mpmc_jax.training import checkpoint, checkpoint_files
from mpmc_jax.training.build import init_state, state_shape
from mpmc_jax.training.checkpoint import Checkpointer
from mpmc_jax.training.integrity import CheckpointError


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


def _refuse(directory, like, message, *, read_only=False):
    """Asserts that no checkpoint there may be gone on with, and why."""
    checkpointer = Checkpointer(directory, read_only=read_only)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.restore_latest(like)
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
    monkeypatch.setattr(checkpoint_files.together, "is_alone", lambda: False)
    monkeypatch.setattr(checkpoint.together, "meet", lambda name: None)
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
        Checkpointer(tmp_path, read_only=True).restore("best", state_shape(parts))


def test_another_format_version_is_refused(tmp_path, small, monkeypatch):
    parts, state = small
    monkeypatch.setattr("mpmc_jax.training.checkpoint.FORMAT_VERSION", 0)
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
        for program in (False, True):
            _refuse(tmp_path, other, "of another network", read_only=program)
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
        Checkpointer(tmp_path / "absent", read_only=True)
    _save(tmp_path, state, [(1, 0.1), (2, 0.2), (3, 0.3)])
    unfinished = tmp_path / "4.orbax-checkpoint-tmp" / "metrics"
    unfinished.mkdir(parents=True)
    (unfinished / "metrics").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    checkpointer = Checkpointer(tmp_path, read_only=True)
    assert checkpointer.restore("last", state_shape(parts)).step == 3
    checkpointer.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        Checkpointer(tmp_path / "file")
