"""Signals that reach a program while it compiles, where Python's handlers wait."""

import signal
import time

import pytest
from data_sets import prepare_synthetic
from programs import CONFIG, SMALL, start


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_step_compiles_ends_at_once(tmp_path, number):
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    process = start(
        "launch.train",
        f"--config={CONFIG}",
        *SMALL,
        "--config.model.width=16",
        f"--config.data.data_dir={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'run'}",
    )
    for line in process.stdout:
        if "compiling the step" in line:
            break
    time.sleep(2)
    begin = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + number, output[-4000:]
    assert "while the step compiles: nothing is left to save" in output


@pytest.mark.full
def test_a_signal_while_the_next_phase_compiles_ends_at_once(tmp_path):
    """What the phase before has trained is saved before."""
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    process = start(
        "launch.train",
        f"--config={CONFIG.replace('unimatch', 'u2pl')}",
        *SMALL,
        "--config.train.checkpoint_every=100",
        "--config.train.eval_every=100",
        "--config.u2pl.bank_size=100",
        "--config.u2pl.bank_size_first=100",
        f"--config.data.data_dir={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'run'}",
    )
    for line in process.stdout:
        if "compiling the next phase's step" in line:
            break
    time.sleep(2)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + signal.SIGTERM, output[-4000:]
    assert "while the step compiles: nothing is left to save" in output
    # Two steps make an epoch, and the first one is the warm-up.
    assert (tmp_path / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA").exists()
