"""A run of two processes, each with a device, beside one process with both."""

import json
import os

import numpy as np
import pytest
from data_sets import prepare_synthetic
from programs import CONFIG, SMALL, free_address, start
from xla import device_flags

from launch import processes


def _metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path):
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    command = (
        f"--config={CONFIG.replace('unimatch', 'supervised')}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.train.devices=0",
        *SMALL,
    )
    address = free_address()
    several = [
        start(
            "launch.train",
            *command,
            f"--workdir={tmp_path / 'two'}",
            f"--coordinator={address}",
            "--processes=2",
            f"--process={index}",
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in several]
    for process, output in zip(several, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    assert "2 devices" in outputs[0]
    # Only the first one reports.
    assert "step 6/6" in outputs[0] and "step 6/6" not in outputs[1]
    workdir = f"--workdir={tmp_path / 'one'}"
    alone = start("launch.train", *command, workdir, XLA_FLAGS=device_flags(2))
    output, _ = alone.communicate(timeout=600)
    assert alone.returncode == 0, output[-4000:]
    found, expected = _metrics(tmp_path / "two"), _metrics(tmp_path / "one")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "val/miou"):
            assert (name in one) == (name in other)
            if name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-3)
    assert (tmp_path / "two" / "checkpoints" / "6").is_dir()


@pytest.mark.parametrize(
    "given",
    [
        {"coordinator": "a:1", "count": 2, "index": 2},
        {"coordinator": "", "count": 2, "index": 0},
        {"coordinator": "a:1", "count": 0, "index": -1},
    ],
)
def test_half_told_is_an_error(given):
    with pytest.raises(ValueError, match="all three are needed"):
        processes.join(found=False, **given)


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", os.abort)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.join(found=False, coordinator="", count=0, index=-1)


def test_under_srun_jax_finds_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda **given: told.append(given)
    )
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    processes.join(found=False, coordinator="", count=0, index=-1)
    assert told == [{"heartbeat_timeout_seconds": processes.HEARTBEAT_SECONDS}]
