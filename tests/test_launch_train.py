"""What `launch.train` says before it trains."""

import logging
import types

import pytest
import tiny
from programs import run

from launch import train
from mpmc_jax.data.splits import Split
from mpmc_jax.training import loop


def _announce(caplog, labeled, unlabeled):
    pipeline = types.SimpleNamespace(
        split=Split(labeled, unlabeled),
        num_labeled=len(labeled),
        num_unlabeled=len(unlabeled),
        repetition=1.0,
        steps_per_epoch=1,
    )
    rhythm = loop.LoopConfig(steps=7, log_every=1, eval_every=1, checkpoint_every=1)
    config = tiny.config("method=unimatch", train__batch_size=4)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        parallel = types.SimpleNamespace(devices=["cpu"])
        train.announce(config, pipeline, rhythm, parallel)
    return caplog.text


def test_images_in_both_lists_and_batches_larger_than_a_list_are_told(caplog):
    letters = tuple("abcde")
    both = _announce(caplog, letters[:2], letters)
    assert "2 labelled images" in both
    assert "5 unlabelled with the labelled ones among them; 1 steps" in both
    assert "come twice" not in both
    few = _announce(caplog, letters[:2], letters[2:])
    assert "3 unlabelled; 1 steps" in few
    assert "train.batch_size=4, but there are 3 unlabelled images" in few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=w"], "error: --config is needed; --help says more"),
        (["--config=configs/camvid.py"], "error: --workdir is needed; --help"),
        (["--config=configs/camvid.py", "--workdir=w", "x"], "arguments ['x']"),
        (["--confg=x"], "Did you mean: config"),
    ],
)
def test_a_command_line_that_lacks_something_ends_in_one_line(arguments, message):
    output = run("launch.train", *arguments, fails=True)
    assert message in output
    assert len(output.splitlines()) == 1


def test_help_is_no_failure():
    output = run("launch.train", "--help")
    assert "--workdir" in output and "--config" in output
