"""Signals that reach a program while it compiles, where Python's handlers wait."""

import signal
import time

import pytest

from tests.support.data_sets import prepare_synthetic
from tests.support.programs import CONFIG, SMALL, start, wait_for


def _signal_while_compiling(place, text, number, config, *settings):
    """Sends a signal some time behind the line with `text`; the run ends at once."""
    prepare_synthetic(place / "data", train=13, val=4)
    process = start(
        "launch.train",
        f"--config={config}",
        *SMALL,
        *settings,
        f"--config.data.data_dir={place / 'data'}",
        f"--workdir={place / 'run'}",
    )
    wait_for(process, text)
    time.sleep(2)
    begin = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + number, output[-4000:]
    assert "while the step compiles: nothing to save yet" in output


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_step_compiles_ends_at_once(tmp_path, number):
    _signal_while_compiling(
        tmp_path, "compiling the step", number, CONFIG, "--config.model.width=16"
    )


@pytest.mark.full
def test_a_signal_while_the_next_phase_compiles_ends_at_once(tmp_path):
    """What the phase before has trained is saved before."""
    _signal_while_compiling(
        tmp_path,
        "compiling the next phase's step",
        signal.SIGTERM,
        CONFIG.replace("unimatch", "u2pl"),
        "--config.train.checkpoint_every=100",
        "--config.train.eval_every=100",
        "--config.u2pl.bank_size=100",
        "--config.u2pl.bank_size_first=100",
    )
    # Two steps make an epoch, and the first one is the warm-up.
    assert (tmp_path / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA").exists()
