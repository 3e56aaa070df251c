"""A user's folder with nothing but images and masks: layouts, --init."""

import json
import runpy
import shutil

import numpy as np
import pytest

from launch import prepare_data
from mpmc_jax.data import registry
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.source import default_palette
from tests.support.own_folder import LABEL, SIZE, write_image, write_mask


def _pairs(root):
    """Id -> names of image and mask, by split."""
    source = registry.read_source("folder", str(root), ("a", "b", "c", "d"))
    assert source.problems == ()
    return {
        sample.id: (sample.image.name, sample.mask and sample.mask.name)
        for split in source.splits.values()
        for sample in split
    }


@pytest.mark.parametrize(
    "image, mask, key",
    [
        ("images/a b/x {}.png", "masks/a b/x {}.png", "a b/x {}"),
        ("Images/{}.png", "Labels/{}_mask.png", "{}"),
        ("images/img_{}.png", "masks/mask_{}.png", "img_{}"),
        ("images/{}_leftImg8bit.png", "masks/{}_gtFine_labelIds.png", ""),
        ("images/deep/er/x{}.png", "masks/x{}_L.png", "deep/er/x{}"),
        ("images/{}.png", "images/{}_mask.png", "{}"),
        ("{}.png", "{}-mask.png", "{}"),
        ("images/IMG_{}.png", "masks/IMG_{}_mask.png", "IMG_{}"),
        ("images/IMG {} (x).png", "masks/a/IMG {} (x) mask.png", "IMG {} (x)"),
        ("IMG_{}.png", "IMG_{}_mask.png", "IMG_{}"),
        ("images/img_{}_rgb.png", "masks/img_{}_mask.png", "img_{}_rgb"),
        ("img_{}_rgb.png", "img_{}_mask.png", "img_{}_rgb"),
        ("images/image{}.png", "masks/mask{}.png", "image{}"),
        ("image{}.png", "mask{}.png", "image{}"),
        ("images/{}.png", "masks/{}.png.png", "{}"),
        ("all/images/{}.png", "all/masks/{}.png", "all/{}"),
        ("imagesTr/x_{}_0000.png", "labelsTr/x_{}.png", "x_{}_0000"),
    ],
)
def test_layouts(image, mask, key, tmp_path):
    for i in range(3):
        write_image(tmp_path / image.format(i))
        write_mask(tmp_path / mask.format(i), LABEL)
    names_of = {
        (key or "{}_leftImg8bit").format(i): tuple(
            text.format(i).rpartition("/")[2] for text in (image, mask)
        )
        for i in range(3)
    }
    assert _pairs(tmp_path) == names_of


def test_a_first_class_called_background_is_black():
    """In an overlay it darkens the image instead of tinting most of it."""
    leaf, stem = default_palette(("leaf", "stem"))
    assert default_palette(("background", "leaf", "stem")) == ((0, 0, 0), leaf, stem)
    # There is black once, so that no other class is taken for it.
    colors = default_palette([f"class {i}" for i in range(60)])
    assert len(set(colors)) == 60 and (0, 0, 0) not in colors


def test_channels_in_files_of_their_own_are_explained(tmp_path):
    for i in range(3):
        for channel in range(2):
            write_image(tmp_path / "imagesTr" / f"x{i}_000{channel}.png")
        write_mask(tmp_path / "labelsTr" / f"x{i}.png", LABEL)
    source = registry.read_source("folder", str(tmp_path), ("a", "b", "c", "d"))
    problems = [line for line in source.problems if "another channel of x" in line]
    assert len(problems) == 3 and "Put all channels of an image into one" in problems[0]


def test_folders_of_splits_hold_images_and_masks(tmp_path):
    for split in ("train", "val"):
        for i in range(2):
            write_image(tmp_path / split / "images" / f"{i}.png")
            write_mask(tmp_path / split / "masks" / f"{i}.png", LABEL)
    source = registry.read_source("folder", str(tmp_path), ("a", "b", "c", "d"))
    assert source.problems == ()
    assert [s.id for s in source.splits["val"]] == ["val/0", "val/1"]
    assert [s.id for s in source.splits["train"]] == ["train/0", "train/1"]


def test_folders_below_unlabeled_hold_no_labeled_images(tmp_path):
    for i in range(2):
        write_image(tmp_path / f"{i}.png")
        write_mask(tmp_path / f"{i}_mask.png", LABEL)
    write_image(tmp_path / "unlabeled" / "img" / "u.png")
    assert _pairs(tmp_path) == {
        "0": ("0.png", "0_mask.png"),
        "1": ("1.png", "1_mask.png"),
        "img/u": ("u.png", None),
    }


def test_two_masks_of_one_image(tmp_path):
    write_image(tmp_path / "images" / "x.png")
    write_mask(tmp_path / "masks" / "x_mask.png", LABEL)
    write_mask(tmp_path / "masks" / "x_gt.png", LABEL)
    source = registry.read_source("folder", str(tmp_path), ("a", "b", "c", "d"))
    assert any("x_gt.png, " in p or "x_mask.png" in p for p in source.problems)


def test_a_misspelled_mask_is_named(tmp_path):
    for name in ("flower_01", "flower_02", "flower_03"):
        write_image(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "masks" / f"{name}.png", LABEL)
    wrong = tmp_path / "masks" / "flwer_03.png"
    (tmp_path / "masks" / "flower_03.png").rename(wrong)
    source = registry.read_source("folder", str(tmp_path), ("a", "b", "c", "d"))
    lonely = source.problems[0]
    assert "is flwer_03.png the mask of flower_03.png? Give it that name" in lonely


def _init(root, data, *more):
    named = ["--dataset=folder", f"--source={root}", f"--data_dir={data}"]
    prepare_data.main([*named, "--init", *more])


def test_a_stray_value_is_mended_as_the_warning_says(tmp_path, capsys):
    root, data = tmp_path / "mine", tmp_path / "data"
    for i in range(6):
        write_image(root / "images" / f"{i}.png", i)
        write_mask(root / "masks" / f"{i}.png", LABEL)
    stray = LABEL.copy()
    stray[0, :3] = 77
    write_mask(root / "masks" / "4.png", stray)
    _init(root, data)
    *_, warning, written, train = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: only one mask holds 77 (")
    assert "3 pixels" in warning and "config.py written" in written
    assert train.startswith("Train with: ")
    write_mask(root / "masks" / "4.png", LABEL)
    removed = [root / "classes.json", root / "config.py", data / "folder"]
    assert all(str(path) in warning for path in removed)
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _init(root, data)
    assert "warning: only" not in capsys.readouterr().out
    assert open_dataset(str(data), "folder").facts.num_classes == 4
    # Only what this folder's call wrote may go.
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "classes.json").unlink()
    write_mask(other / "masks" / "4.png", stray)
    with pytest.raises(SystemExit, match="was made from other data"):
        _init(other, data)
    (warning,) = [
        x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: only")
    ]
    assert f"mend the mask, remove {other / 'classes.json'}, and run" in warning
    (other / "classes.json").unlink()
    _init(other, tmp_path / "b")
    (warning,) = [
        x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: only")
    ]
    assert f"{other / 'classes.json'} and {tmp_path / 'b' / 'folder'}, and" in warning


def test_init_writes_what_training_needs(tmp_path, capsys):
    root = tmp_path / 'it\'s "mine"'
    for i in range(12):
        write_image(root / "images" / f"{i}.png", i)
        write_mask(root / "masks" / f"{i}.png", LABEL)
    _init(root, tmp_path / "data", "--classes=bg,x,y,z")
    out = capsys.readouterr().out
    assert "python -m launch.train --config=" in out
    facts = json.loads((root / "classes.json").read_text())
    assert facts == {"classes": ["bg", "x", "y", "z"]}
    config = runpy.run_path(str(root / "config.py"))["get_config"]("split=3")
    assert config.data.data_dir == str(tmp_path / "data")
    assert (config.data.name, config.data.split, config.data.crop) == (
        "folder",
        "3",
        33,
    )
    assert config.mpmc.enabled and config.method.name == "unimatch"
    assert open_dataset(config.data.data_dir, "folder").facts.num_classes == 4
    # A second call overwrites nothing.
    (root / "config.py").write_text("mine")
    _init(root, tmp_path / "data")
    assert (root / "config.py").read_text() == "mine"
    assert "config.py exists and is kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"classes.json exists; change the names"):
        _init(root, tmp_path / "data", "--classes=a,b,c,d")


def test_init_lists_images_without_masks(tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(8):
        write_image(root / "images" / f"a {i}.png", i)
    for i in range(4):
        write_mask(root / "masks" / f"a {i}.png", LABEL)
    write_image(root / "unlabeled" / "u.png")
    write_image(tmp_path / "photos" / "p.png", 9)
    _init(root, tmp_path / "data", f"--unlabeled={tmp_path / 'photos'}")
    out = capsys.readouterr().out
    assert (
        "unlabeled.txt written, with 4 images without a mask: a 4, a 5, a 6, a 7" in out
    )
    ids = open_dataset(str(tmp_path / "data"), "folder").ids
    assert ids["train"][3:] == ("a 4", "a 5", "a 6", "a 7", "u", "photos/p")
    # Not where a mask has no image: its name may be misspelled.
    (root / "unlabeled.txt").unlink()
    (root / "masks" / "a 0.png").rename(root / "masks" / "b 0.png")
    with pytest.raises(SystemExit, match="no mask for .*a 0.png"):
        _init(root, tmp_path / "data")
    assert not (root / "unlabeled.txt").exists()


def test_a_kept_config_of_other_data(tmp_path, capsys):
    """Folds are prepared one after the other, with one config.py for all."""
    root = tmp_path / "mine"
    for i in range(4):
        write_image(root / "images" / f"{i}.png", i)
        write_mask(root / "masks" / f"{i}.png", LABEL)

    def last_lines(data):
        _init(root, data)
        return capsys.readouterr().out.splitlines()[-2:]

    _, first = last_lines(tmp_path / "a")
    assert "--config.data.data_dir" not in first
    warning, command = last_lines(tmp_path / "b")
    assert f"kept, and it names data_dir={tmp_path / 'a'};" in warning
    assert command == (f"{first}_b --config.data.data_dir={tmp_path / 'b'}")
    assert last_lines(tmp_path / "a") == [
        f"{root / 'config.py'} exists and is kept",
        first,
    ]


def test_problems_leave_no_unlabeled_list(tmp_path, capsys):
    for i in range(4):
        write_image(tmp_path / "imagesTr" / f"x{i}_0000.png", i)
        write_mask(tmp_path / "labelsTr" / f"x{i}.png", LABEL)
    write_image(tmp_path / "imagesTr" / "x3_0001.png", 9)
    with pytest.raises(SystemExit, match="is it another channel of x3_0000.png"):
        _init(tmp_path, tmp_path / "data")
    assert not (tmp_path / "unlabeled.txt").exists()
    assert "unlabeled.txt" not in capsys.readouterr().out


def test_init_of_nnunet(tmp_path, capsys):
    root = tmp_path / "nn"
    for i in range(4):
        write_image(root / "imagesTr" / f"x{i}_0000.png", i)
        write_mask(root / "labelsTr" / f"x{i}.png", LABEL)
    write_image(root / "imagesTs" / "y_0000.png", 9)
    labels = {"background": 0, "leaf": 1, "stem": "2", "ignore": 3}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    (root / "Readme").write_text("x")
    tests = root / "imagesTs"
    _init(root, tmp_path / "a")
    out = capsys.readouterr().out
    assert f"not read: Readme, imagesTs/; --unlabeled={tests} reads its images" in out
    facts = json.loads((root / "classes.json").read_text())
    assert facts == {"classes": ["background", "leaf", "stem"], "void": [3]}
    _init(root, tmp_path / "b", f"--unlabeled={tests}")
    assert "not read: Readme\n" in capsys.readouterr().out
    assert open_dataset(str(tmp_path / "b"), "folder").ids["train"][-1] == (
        "imagesTs/y_0000"
    )


def test_init_of_other_data_and_wrong_names(tmp_path):
    write_image(tmp_path / "images" / "0.png")
    write_mask(tmp_path / "masks" / "0.png", LABEL)
    with pytest.raises(SystemExit, match="2 names for 4 classes: background, class_1"):
        _init(tmp_path, tmp_path / "data", "--classes=a,b")
    with pytest.raises(SystemExit, match="--init is for --dataset=folder"):
        prepare_data.main(["--dataset=voc", f"--source={tmp_path}", "--init"])


@pytest.mark.parametrize(
    "shape, dtype, suffix",
    [
        ((*SIZE, 5), np.uint16, ".npy"),
        (SIZE, np.uint16, ".png"),
        ((*SIZE, 4), np.uint16, ".tif"),
    ],
    ids=["five channels", "16 bits", "pages"],
)
def test_init_of_other_images(shape, dtype, suffix, tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(4):
        write_image(root / "images" / f"{i}{suffix}", i, shape, dtype)
        write_mask(
            root / "masks" / f"{i}.png", np.where(LABEL, 255, 0).astype(np.uint8)
        )
    _init(root, tmp_path / "data")
    pixels = open_dataset(str(tmp_path / "data"), "folder").facts.pixels
    assert (pixels.channels, pixels.dtype) == ((*shape, 1)[2], "uint16")


def test_unlabeled_images_from_elsewhere(tmp_path):
    root, other = tmp_path / "mine", tmp_path / "photos"
    for i in range(3):
        write_image(root / "images" / f"{i}.png", i)
        write_mask(root / "masks" / f"{i}.png", LABEL)
    for name in ("a/1.png", "a/2.png", "b/1.png", "c.png"):
        write_image(other / name)
    (other / "a" / "notes.txt").write_text("x")

    def unlabeled(text):
        source = registry.read_source("folder", str(root), tuple("abcd"), str(text))
        assert source.problems == ()
        return [s.id for s in source.splits["train"] if s.mask is None]

    every = ["photos/a/1", "photos/a/2", "photos/b/1", "photos/c"]
    assert unlabeled(other) == every
    assert unlabeled(other / "**" / "*.png") == every
    assert unlabeled(other / "a" / "*.png") == ["a/1", "a/2"]
    (tmp_path / "list.txt").write_text(
        "photos/b/1.png\nphotos/c.png\nmine/images/0.png"
    )
    assert unlabeled(tmp_path / "list.txt") == ["photos/b/1", "photos/c"]
    assert unlabeled(root / "images" / "*.png") == []
    source = registry.read_source("folder", str(root), tuple("abcd"), "absent/*.png")
    assert "--unlabeled=absent/*.png: no image" in source.problems[0]
    with pytest.raises(ValueError, match="--unlabeled=x: voc has images of its own"):
        registry.read_source("voc", str(root), (), "x")
