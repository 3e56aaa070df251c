"""Weights & Biases gets what TensorBoard gets; a stub stands in for its module."""

import io
import logging
import sys
import types

import pytest
from PIL import Image

from mpmc_jax.training import wandb_writer
from mpmc_jax.training.metric_writer import Picture


class _Run:
    def __init__(self):
        self.logged, self.finished, self.broken = [], False, False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)
        if self.broken:
            raise RuntimeError("no network\nat all")

    def finish(self):
        self.finished = True
        raise RuntimeError("no network")


@pytest.fixture
def wandb(monkeypatch):
    stub = types.ModuleType("wandb")
    stub.calls, stub.run = [], _Run()

    def init(**options):
        stub.calls.append(options)
        return stub.run

    stub.init, stub.Image = init, lambda image: image.size
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_numbers_and_pictures_go_to_a_run_that_a_resumed_one_continues(wandb, tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, "PNG")
    workdir = tmp_path / "mine"
    workdir.mkdir()
    for _ in range(2):
        writer = wandb_writer.WandbWriter("seg", workdir, {"seed": 1})
        writer.write(5, {"val/miou": 0.5})
        writer.write_pictures(5, {"panels/a": Picture(stream.getvalue(), 2, 3)})
        writer.flush()
        writer.close()
    first, second = wandb.calls
    assert first == second and first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("seg", "mine")
    assert first["config"] == {"seed": 1} and first["dir"] == str(workdir)
    assert wandb.run.logged[:2] == [
        {"step": 5, "val/miou": 0.5},
        {"step": 5, "panels/a": (3, 2)},
    ]
    assert wandb.run.finished


def test_a_run_that_does_not_start_is_one_line_with_the_mend(wandb, tmp_path):
    def init(**options):
        raise RuntimeError("api_key not configured (no-tty)\nat all")

    wandb.init = init
    with pytest.raises(ValueError) as raised:
        wandb_writer.WandbWriter("seg", tmp_path, {})
    (line,) = str(raised.value).splitlines()
    for said in ("'seg'", "no-tty", "`wandb login`", "WANDB_MODE=offline"):
        assert said in line


def test_what_wandb_does_not_take_is_said_once(wandb, tmp_path, caplog):
    writer = wandb_writer.WandbWriter("seg", tmp_path, {})
    wandb.run.broken = True
    with caplog.at_level(logging.WARNING):
        for step in (5, 6):
            writer.write(step, {"val/miou": 0.5})
            writer.write_pictures(step, {"panels/a": Picture(b"no PNG", 2, 3)})
    (record,) = caplog.records
    assert "wandb did not take step 5 (no network)" in record.getMessage()
    wandb.run.broken = False
    writer.write(7, {"val/miou": 0.5})
    assert [values["step"] for values in wandb.run.logged] == [5, 6, 7]


def test_without_wandb_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[wandb\]'"):
        wandb_writer.load_wandb()
