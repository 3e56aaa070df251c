"""The worked examples of docs/extending.md, applied to a copy of the project."""

import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support.documents import code_blocks
from tests.support.programs import ROOT, SMALL, read_metrics, run

_PAGE = ROOT / "docs" / "extending.md"


def _write_files(project):
    """Writes the page's new files, which begin with their paths."""
    for block in code_blocks(_PAGE, "python"):
        name, content = block.removeprefix("# ").split("\n", 1)
        path = project / name
        assert not path.exists(), f"{name} is there already"
        path.write_text(content)


def _apply_changes(project):
    """Applies the page's changes, whose context must be found exactly once."""
    for block in code_blocks(_PAGE, "diff"):
        name, *hunks = re.split(r"^@@\n", block, flags=re.MULTILINE)
        path = project / name.strip().removeprefix("--- ")
        text = path.read_text()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            assert {line[0] for line in lines} == {" ", "+"}, hunk
            before = "".join(line[1:] for line in lines if line[0] == " ")
            # As a line of its own, not as a part of one.
            assert f"\n{text}".count(f"\n{before}") == 1, f"{path.name}: {before}"
            text = text.replace(before, "".join(line[1:] for line in lines))
        path.write_text(text)


def _copy_project(place):
    """Copies the project to `place` and applies the page."""
    for name in ("configs", "launch", "mpmc_jax"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    _write_files(place)
    _apply_changes(place)


def _write_leaves(source):
    """Images of three classes and void, as the example's reader has them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        (source / split).mkdir(parents=True)
        for number in range(count):
            values = rng.integers(0, 4, (4, 4)).repeat(16, 0).repeat(16, 1)
            values[:8, :24] = np.arange(1, 4).repeat(8)
            image = 60 * values[..., None] + rng.integers(0, 40, (64, 64, 3))
            path = source / split / f"leaf {number}.jpg"
            Image.fromarray(image.astype(np.uint8)).save(path, quality=95)
            mask = path.with_name(f"{path.stem}_label.png")
            Image.fromarray(values.astype(np.uint8)).save(mask)


def test_the_examples_fit_the_code(tmp_path):
    """Their changes find their places, and what results is Python."""
    _copy_project(tmp_path)
    names = [block.split("\n")[0] for block in code_blocks(_PAGE, "python")]
    for name in names:
        path = tmp_path / name.removeprefix("# ")
        compile(path.read_text(), str(path), "exec")


@pytest.mark.full
def test_the_examples_run(tmp_path):
    project = tmp_path / "project"
    _copy_project(project)
    _write_leaves(project / "leaves")
    lines = [
        shlex.split(line.removeprefix("$ python -m "))
        for block in code_blocks(_PAGE, "console")
        for line in block.splitlines()
    ]
    assert [line[0].removeprefix("launch.") for line in lines] == [
        "check_data",
        "prepare_data",
        "train",
        "experiments",
    ]
    for line in lines:
        small = ()
        if line[0] == "launch.train":
            line[1] += ",backbone=resnet18"
            small = (*SMALL, "--config.method.threshold=0.3")
        run(*line, *small, cwd=project, PYTHONPATH="")
    (last, *_) = reversed(read_metrics(project / "runs" / "leaves"))
    assert last["step"] == int(SMALL[3].split("=")[1])
    values = {key for each in read_metrics(project / "runs" / "leaves") for key in each}
    assert {"train/loss_unlabeled", "train/loss_patch_unlabeled", "val/miou"} <= values
    table = (project / "figures" / "class_shares.csv").read_text()
    assert table.startswith("run,class,truth,prediction") and "disease" in table
