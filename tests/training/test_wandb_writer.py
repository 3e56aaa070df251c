"""Weights & Biases gets what TensorBoard gets; a stub stands in for its module."""

import io
import sys
import types

import pytest
from PIL import Image

from mpmc_jax.training import wandb_writer
from mpmc_jax.training.metric_writer import Picture


class _Run:
    def __init__(self):
        self.logged, self.finished = [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

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


def test_without_wandb_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'mpmc-jax\[wandb\]'"):
        wandb_writer.load_wandb()
