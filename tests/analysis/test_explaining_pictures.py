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
    drawn = sorted(tmp_path.glob("*.png"))
    kept = sorted(path.name for path in folder.glob("*.png"))
    assert [path.name for path in drawn] == kept
    for path in drawn:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 5, path.name
