import subprocess
import sys

import numpy as np
import pytest

from launch import check_data, prepare_data
from mpmc_jax.data import registry
from mpmc_jax.data.dataset import open_dataset
from tests.support.data_sets import make_folder, write_image


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "src")


def _label(root, name="im03"):
    return root / "masks" / f"{name}.png"


def _fails(capsys, module, *arguments):
    """The one line with which a launcher ends."""
    with pytest.raises(SystemExit) as stop:
        module.main(list(arguments))
    capsys.readouterr()
    # A text given to sys.exit is printed to stderr, and the code is 1.
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_command_line(folder, tmp_path, capsys):
    data_dir = str(tmp_path / "data")
    named = ("--dataset=folder", f"--source={folder}")
    check_data.main([*named])
    out = capsys.readouterr().out
    assert "No problem found." in out
    assert "(void)" in out
    assert "no training mask holds" not in out
    # In a program of its own, to see that TFDS keeps quiet.
    command = (sys.executable, "-m", "launch.prepare_data", *named)
    command += (f"--data_dir={data_dir}",)
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    info = open_dataset(data_dir, "folder")
    assert first.stderr == ""
    assert first.stdout.splitlines() == [
        "folder/train: 11 images, 11 with mask",
        "folder/val: 1 image, 1 with mask",
        "3 classes, RGB: a, b, c",
        f"note: {folder}: no val.txt; 1 labeled image held out for validation: "
        f"{info.ids['val'][0]}; scores of so few images say little: list more in "
        "val.txt",
        f"Prepared in {info.directory}",
    ]
    prepare_data.main([*named, f"--data_dir={data_dir}"])
    assert "has not changed" in capsys.readouterr().out
    write_image(_label(folder), np.full((20, 24), 1, np.uint8))
    changed = _fails(capsys, prepare_data, *named, f"--data_dir={data_dir}")
    assert "HAS CHANGED" in changed


def test_command_line_lists_all_problems_and_writes_nothing(folder, tmp_path, capsys):
    write_image(_label(folder), np.full((20, 24), 9, np.uint8))
    _label(folder, "im05").write_text("x")
    other = tmp_path / "other"
    named = ("--dataset=folder", f"--source={folder}")
    for module, extra in ((check_data, ()), (prepare_data, (f"--data_dir={other}",))):
        heading, *problems = _fails(capsys, module, *named, *extra).splitlines()
        assert heading == "error: 2 problems"
        assert len(problems) == 2
        assert "im03" in problems[0]
        assert "im05" in problems[1]
    assert not other.exists()
    for module in (check_data, prepare_data):
        assert _fails(capsys, module, "--dataset=folder", "--source=absent") == (
            "error: --source=absent: no such folder; give the source folder of 'folder'"
        )
        assert _fails(capsys, module, "--dataset=camvid") == (
            "error: --source=DIR is missing: give the source folder of 'camvid'"
        )


def test_class_names_by_hand_and_labeled_images_in_no_list(folder, capsys):
    (folder / "classes.json").unlink()
    (folder / "train.txt").write_text("im00\nim01\nim02\nim03\n")
    named = ("--dataset=folder", f"--source={folder}")
    check_data.main([*named, "--classes=a,b,c"])
    with pytest.raises(SystemExit, match="a name between commas is empty"):
        check_data.main([*named, "--classes=a,,b,c"])
    out = capsys.readouterr().out
    assert "3 classes, RGB: a, b, c" in out
    assert "8 images of images/ in none of train.txt and not used" in out
    without = _fails(capsys, check_data, *named)
    assert "no class names" in without


@pytest.mark.parametrize("module", [check_data, prepare_data])
def test_help_names_every_argument(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("--dataset", "--source", "--classes"))


def test_unknown_data_set_lists_the_valid_ones():
    with pytest.raises(ValueError, match="imagenet.*synthetic, folder, camvid"):
        registry.read_source("imagenet", ".")


def test_a_class_without_pixels_is_noted(folder, capsys):
    classes = folder / "classes.json"
    classes.write_text('{"classes": ["a", "b", "c", "never"]}')
    check_data.main(["--dataset=folder", f"--source={folder}"])
    out = capsys.readouterr().out
    assert "note: folder: no training mask holds never; launch.train refuses" in out
    assert "--config.data.allow_absent_classes=True" in out
