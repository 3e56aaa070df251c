"""The pictures of docs/mpmc_in_pictures.md can be drawn again."""

import importlib.util

import pytest
from PIL import Image

from mpmc_jax.analysis.base import SavedRun
from tests.support.programs import ROOT


@pytest.mark.full
def test_all_pictures_are_drawn(trained, tmp_path):
    folder = ROOT / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("draw", folder / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(tmp_path, SavedRun(trained.mpmc, "last"))
    kept = {path.name: Image.open(path) for path in folder.glob("*.png")}
    drawn = {path.name: Image.open(path) for path in tmp_path.glob("*.png")}
    assert kept.keys() == drawn.keys()
    for name, picture in drawn.items():
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 5, name
