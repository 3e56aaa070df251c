"""A run's directory: whose it is, and what may change under it."""

import pytest
import tiny

from launch import settings
from mpmc_jax.training import workdir


def test_a_workdir_of_another_run_is_refused_with_the_difference(tmp_path):
    cfg = tiny.config("method=supervised", optimizer__lr=0.01)
    other = tiny.config("method=supervised", optimizer__lr=0.5)
    # One that saved nothing makes room.
    workdir.claim(tmp_path, other)
    workdir.claim(tmp_path, cfg)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    workdir.claim(tmp_path, cfg)
    with pytest.raises(workdir.WorkdirError) as caught:
        workdir.claim(tmp_path, other)
    assert "optimizer.lr: 0.01 there, 0.5 now" in str(caught.value)
    other = tiny.config("method=supervised")
    with other.unlocked():
        other.format_version = 0
    with pytest.raises(workdir.WorkdirError, match="format_version 2"):
        workdir.claim(tmp_path, other)
    with pytest.raises(workdir.WorkdirError, match="holds no run"):
        workdir.load(tmp_path / "nothing", cfg)
    for text, why in (("{", "damaged"), ("[]", "damaged"), ("{}", "version None")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(workdir.WorkdirError, match=why):
            workdir.load(tmp_path, cfg)


def test_how_a_run_is_done_may_change(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    workdir.claim(tmp_path, tiny.config("method=supervised"))
    other = tiny.config("method=supervised", train__devices=2, data__data_dir="moved")
    workdir.claim(tmp_path, other)
    base = tiny.config("method=supervised")
    assert workdir.load(tmp_path, base).data.data_dir == "moved"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer__lr", -1.0, "optimizer.lr=-1.0 must not be negative"),
        ("mpmc__alpha", -1.0, "mpmc.alpha=-1.0 must not be negative"),
        ("model__width", 0, "model.width=0 must be positive"),
        ("train__group_size", 0, "train.group_size=0 must be positive"),
        ("seed", -1, "seed=-1 must not be negative"),
        ("optimizer__lr", float("nan"), "optimizer.lr=nan must not be negative"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(key, value, message):
    settings.check_ranges(tiny.config("method=supervised"))
    with pytest.raises(ValueError, match=message):
        settings.check_ranges(tiny.config("method=supervised", **{key: value}))


def test_a_run_keeps_its_data_and_lists_its_parts(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    workdir.record(tmp_path, {"data": {"fingerprint": "a"}}, {"revision": "1"})
    workdir.record(tmp_path, {"data": {"fingerprint": "a"}}, {"revision": "2"})
    found = workdir.read_manifest(tmp_path)
    assert found["revision"] == "1"
    assert found["resumed"] == [{"revision": "2"}]
    with pytest.raises(workdir.WorkdirError, match="data.fingerprint: 'a' there, 'b'"):
        workdir.record(tmp_path, {"data": {"fingerprint": "b"}}, {"revision": "3"})
    assert workdir.read_manifest(tmp_path) == found
