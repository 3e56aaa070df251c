"""Every run of the paper's tables is the published configuration, and builds."""

import re

import pytest

from launch.experiments import __main__ as experiments
from mpmc_jax.experiments.build import build_base, build_setup
from mpmc_jax.experiments.paper import base, registry
from mpmc_jax.pixels import GRAY, RGB
from tests.support import tiny
from tests.support.documents import ROOT

CLASSES = {"voc": 21, "cityscapes": 19, "acdc": 4}
MAIN = ("table1", "table2", "table3")


def _plan(name):
    changes = {"lists": "splits"}
    return base.plan(name, registry.EXPERIMENTS[name], changes=changes)


def _config(run):
    return experiments._configuration(run.flags())


def test_the_tables_have_every_cell_of_the_paper():
    sizes = {name: (len(_plan(name).rows), len(_plan(name).columns)) for name in MAIN}
    # Four methods with and without MPMC; supervision; two backbones but for ACDC.
    assert sizes == {"table1": (18, 8), "table2": (16, 4), "table3": (9, 2)}


def test_every_cell_reads_its_own_lists_at_the_published_crop():
    crops = {"unimatch": 801, "augseg": 800, "u2pl": 769, "ael": 769}
    for run in (run for name in MAIN for run in _plan(name).runs):
        config = _config(run)
        name, method, split = config.data.name, config.method.name, config.data.split
        assert config.data.labeled_ids.endswith(f"/{split}/labeled.txt")
        assert config.data.unlabeled_ids.endswith(f"/{split}/unlabeled.txt")
        if name == "voc":
            small = method in ("unimatch", "supervised") and split.isdecimal()
            assert config.data.crop == (321 if small else 513)
        elif name == "cityscapes":
            assert config.data.crop == crops[method]
        else:
            assert (config.data.crop, config.model.name) == (256, "unet")
        assert config.mpmc.enabled == (run.argument["mpmc"] == "paper")


def test_the_page_names_every_table_and_its_command():
    page = (ROOT / "docs" / "reproduce.md").read_text()
    for name in registry.EXPERIMENTS:
        assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE)


def _builds():
    """One run for each method, mode and crop: lists and depth change no more."""
    seen = {}
    for name in registry.EXPERIMENTS:
        for run in _plan(name).runs:
            given = run.argument
            parts = [run.dataset, given["method"], given["mpmc"]]
            parts += [_config(run).data.crop, *run.settings.items()]
            if "vit" not in given.get("backbone", ""):
                seen.setdefault("-".join(map(str, parts)), run)
    return seen


@pytest.mark.full
def test_every_row_builds():
    for run in _builds().values():
        config = _config(run)
        # Only the size is a toy's: what fits what is checked as in earnest.
        is_unet = config.model.name == "unet"
        config.model.width = 16 if is_unet else 8
        config.model.backbone = "tiny"
        config.data.crop = 64 if is_unet else tiny.CROP
        model, method = build_base(
            config,
            num_classes=CLASSES[config.data.name],
            pixels=GRAY if is_unet else RGB,
            num_unlabeled=1000,
        )
        setup = build_setup(config, model, method, steps_per_epoch=10)
        assert setup.step.schedule.steps == 10 * config.train.epochs
