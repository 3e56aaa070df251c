"""From images and masks as people have them to a run, by the commands of the page."""

import json

import numpy as np
import pytest
from PIL import Image

from launch import check_data, prepare_data
from tests.support.data_sets import real
from tests.support.programs import SMALL, run


def _write_users_folder(root, count):
    """CamVid with palette masks, spaces, other endings and folders per drive."""
    camvid = real("camvid")
    lines = (camvid / "train.txt").read_text().split("\n")[:count]
    for i, line in enumerate(lines):
        image, mask = (Image.open(camvid / part) for part in line.split())
        folder = f"drive {i % 2}"
        for part in ("Images", "Labels"):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
        image.resize((96, 72)).save(root / "Images" / folder / f"{i} (1).JPG")
        mask = mask.resize((96, 72), Image.Resampling.NEAREST)
        mask.putpalette([(37 * i) % 256 for i in range(768)])
        mask.save(root / "Labels" / folder / f"{i} (1)_L.png")


@pytest.mark.full
def test_from_images_and_masks_to_a_run(tmp_path):
    root = tmp_path / "my photos"
    _write_users_folder(root, 12)
    data = f"--data_dir={tmp_path / 'data'}"
    named = ["--dataset=folder", f"--source={root}"]
    prepare_data.main([*named, "--init", data])
    facts = json.loads((root / "classes.json").read_text())
    assert len(facts["classes"]) == 10 and len(facts["void"]) == 1
    workdir = tmp_path / "run"
    run(
        "launch.train",
        f"--config={root / 'config.py'}:method=supervised,mpmc=off,backbone=resnet18",
        f"--workdir={workdir}",
        *SMALL,
    )
    page = tmp_path / "labels.html"
    check_data.main([*named, f"--workdir={workdir}", f"--html={page}"])
    assert page.stat().st_size > 10_000
    run(
        "launch.predict",
        f"--workdir={workdir}",
        "--input",
        str(root / "Images" / "drive 0"),
        f"--output={tmp_path / 'out'}",
    )
    found = sorted((tmp_path / "out").glob("*_index.png"))
    assert len(found) == 6
    index = np.asarray(Image.open(found[0]))
    assert index.shape == (72, 96) and index.max() < 10
