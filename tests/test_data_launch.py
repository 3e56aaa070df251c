import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import check_data, prepare_data
from mpmc_jax.data import build
from mpmc_jax.data.info import open_dataset
from tests.data_sets import make_folder, write_image


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "src")


def _label(root, name="im03"):
    return root / "masks" / f"{name}.png"


def _main(capsys, module, **values):
    """Runs a launcher here: (exit code or message, what it printed)."""
    flags.FLAGS.mark_as_parsed()
    code = 0
    with flagsaver.flagsaver(**values):
        try:
            module.main([module.__name__])
        except SystemExit as stop:
            code = stop.code
    return code, capsys.readouterr().out


def test_command_line(folder, tmp_path, capsys):
    data_dir = str(tmp_path / "data")
    named = {"dataset": "folder", "source": str(folder)}
    code, out = _main(capsys, check_data, **named)
    assert code == 0
    assert "No problem found." in out
    assert "(void)" in out
    # In a program of its own, to see that TFDS keeps quiet.
    flag_list = ("--dataset=folder", f"--source={folder}", f"--data_dir={data_dir}")
    command = (sys.executable, "-m", "launch.prepare_data", *flag_list)
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    info = open_dataset(data_dir, "folder")
    assert first.stderr == ""
    assert first.stdout.splitlines() == [
        "folder/train: 11 images, 11 with mask",
        "folder/val: 1 images, 1 with mask",
        "3 classes, RGB: a, b, c",
        f"Prepared in {info.directory}",
    ]
    again = _main(capsys, prepare_data, **named, data_dir=data_dir)
    assert again[0] == 0
    assert "has not changed" in again[1]
    write_image(_label(folder), np.full((20, 24), 1, np.uint8))
    changed = _main(capsys, prepare_data, **named, data_dir=data_dir)
    assert "HAS CHANGED" in changed[0]


def test_command_line_lists_all_problems_and_writes_nothing(folder, tmp_path, capsys):
    write_image(_label(folder), np.full((20, 24), 9, np.uint8))
    _label(folder, "im05").write_text("x")
    other = tmp_path / "other"
    named = {"dataset": "folder", "source": str(folder)}
    for module, extra in ((check_data, {}), (prepare_data, {"data_dir": str(other)})):
        # A text given to sys.exit is printed to stderr, and the code is 1.
        code, _ = _main(capsys, module, **named, **extra)
        heading, *problems = code.splitlines()
        assert heading == "ERROR: 2 problems"
        assert len(problems) == 2
        assert "im03" in problems[0]
        assert "im05" in problems[1]
    assert not other.exists()
    for module in (check_data, prepare_data):
        code, _ = _main(capsys, module, dataset="folder", source="absent")
        assert code == "ERROR: --source=absent: no such folder; it must hold 'folder'"


def test_unknown_data_set_lists_the_valid_ones():
    with pytest.raises(ValueError, match="imagenet.*synthetic, folder, camvid"):
        build.read_source("imagenet", ".")
