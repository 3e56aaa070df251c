"""Every command of docs/reproduce.md for a cell of the paper's tables builds."""

import itertools
import re

import ml_collections
import pytest

from mpmc_jax.experiments.build import build_base, build_setup
from mpmc_jax.pixels import GRAY, RGB
from tests.support import tiny
from tests.support.documents import ROOT, config_of

METHODS = ("augseg", "ael", "u2pl", "unimatch")
BACKBONES = ("resnet50", "resnet101")
CLASSES = {"voc": 21, "cityscapes": 19, "acdc": 4}


def _rows():
    """(cells, command, splits) of the page's sections."""
    text = (ROOT / "docs" / "reproduce.md").read_text()
    sections = re.findall(
        r"^### (Table [^\n]*)\n\n```sh\n(.*?)```\n\nSPLIT: ([^\n]*)$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    return [
        (cells, " ".join(command.replace("\\\n", " ").split()), splits)
        for cells, command, values in sections
        if (splits := re.findall(r"`([^`]*)`", values))
    ]


def _commands():
    """Every cell's command, capitals replaced."""
    for _, line, splits in _rows():
        backbones = BACKBONES if "BACKBONE" in line else BACKBONES[:1]
        for method, mode, backbone, split in itertools.product(
            METHODS, ("off", "paper"), backbones, splits
        ):
            command = line.replace("METHOD", method).replace("MPMC", mode)
            yield command.replace("BACKBONE", backbone).replace("SPLIT", split)


def _config(command: str) -> ml_collections.ConfigDict:
    """The configuration that `launch.train` would make of a command."""
    program, *flags = command.removeprefix("python -m ").split()
    assert program == "launch.train"
    assert flags[-1].startswith("--workdir=runs/")
    return config_of(flags)


def test_the_table_has_every_cell_of_the_paper():
    rows = {cells: splits for cells, _, splits in _rows()}
    assert {cells: len(splits) for cells, splits in rows.items()} == {
        "Table 1, Classic": 5,
        "Table 1, Blender": 3,
        "Table 2": 4,
        "Table 3": 2,
    }
    # Four methods with and without MPMC; two backbones but for ACDC.
    commands = list(_commands())
    assert len(commands) == len(set(commands)) == 8 * (2 * (5 + 3 + 4) + 2)


def test_every_cell_reads_its_own_lists_at_the_published_crop():
    crops = {"unimatch": 801, "augseg": 800, "u2pl": 769, "ael": 769}
    for command in _commands():
        config = _config(command)
        name, method, split = config.data.name, config.method.name, config.data.split
        assert config.data.labeled_ids.endswith(f"/{split}/labeled.txt")
        assert config.data.unlabeled_ids.endswith(f"/{split}/unlabeled.txt")
        if name == "voc":
            classic = method == "unimatch" and split.isdecimal()
            assert config.data.crop == (321 if classic else 513)
        elif name == "cityscapes":
            assert config.data.crop == crops[method]
        else:
            assert (config.data.crop, config.model.name) == (256, "unet")
        assert config.mpmc.enabled == ("mpmc=paper" in command)


def _builds():
    """One command for each row, method and mode: lists and depth change no more."""
    seen = {}
    for command in _commands():
        config = _config(command)
        key = (
            config.data.name,
            config.method.name,
            config.mpmc.enabled,
            config.data.crop,
        )
        seen.setdefault("-".join(map(str, key)), command)
    return seen


@pytest.mark.full
@pytest.mark.parametrize("cell", _builds())
def test_a_cell_builds(cell):
    config = _config(_builds()[cell])
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
