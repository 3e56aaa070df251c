"""Which files of a user's folder are data, and for which split."""

import json
import os

import numpy as np
import pytest

from launch import check_data
from mpmc_jax.data import build, check, decode, registry
from tests.support.data_sets import config_for, make_folder, write_image


@pytest.fixture
def folder(tmp_path):
    """im00 to im05, and u0 and u1 without masks."""
    root = make_folder(tmp_path / "src", images=6)
    rng = np.random.default_rng(1)
    for i in range(2):
        image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        write_image(root / "unlabeled" / f"u{i}.png", image)
    return root


def _splits(root):
    """Split -> ids with mask, ids without; the folder must have no problem."""
    source = registry.read_source("folder", str(root))
    assert check.check_source(source).problems == ()
    return {
        split: tuple(
            [sample.id for sample in samples if (sample.mask is None) == bare]
            for bare in (False, True)
        )
        for split, samples in source.splits.items()
    }


def _problems(root):
    return check.check_source(registry.read_source("folder", str(root))).problems


def _notes(root):
    return "\n".join(registry.read_source("folder", str(root)).notes)


def _list(root, name, *ids):
    (root / f"{name}.txt").write_text("\n".join(ids))


def _move(root, key, folder):
    for part in ("images", "masks"):
        (root / part / folder).mkdir(exist_ok=True)
        os.rename(root / part / f"{key}.png", root / part / folder / f"{key}.png")


def test_hidden_files_are_no_data(folder):
    _list(folder, "val", "im00")
    expected = _splits(folder)
    copy = (folder / "images" / "im00.png").read_bytes()
    for part in ("images", "masks", "unlabeled"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (folder / part / name).mkdir()
            (folder / part / name / "im00-checkpoint.png").write_bytes(copy)
        for name in ("._im00.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / part / name).write_bytes(b"\0\5\26\7")
    assert _splits(folder) == expected
    note = f"{folder / 'masks'}: not read: 7 hidden (.DS_Store, ._im00.png, "
    assert note in _notes(folder)


def test_files_that_are_not_read_are_counted_by_ending(folder):
    for name in ("a.heic", "b.HEIC", "notes.md", "plain"):
        (folder / "images" / name).write_text("x")
    (folder / "val_list.txt").write_text("im00")
    (folder / "test").mkdir()
    notes = _notes(folder)
    expected = "2 .heic (a.heic, b.HEIC); 1 .md (notes.md); 1 without ending (plain)"
    assert f"{folder / 'images'}: not read: {expected}" in notes
    assert f"{folder}: not read: test/, val_list.txt" in notes


@pytest.mark.parametrize(
    ("listed", "agrees"),
    [
        ("a\nb\nc", True),
        ("a\nb\nc\nd", True),
        ("0 a\n2 c", False),
        ("c\nb\na", False),
        ("background\nb\nc", False),
        ("a 0 0 0\nb 9 0 0\nc 0 9 0\nvoid 0 0 9", True),
        ("a 0 0 0\nb 9 0 0", False),
    ],
)
def test_a_list_of_other_class_names_is_not_read(folder, listed, agrees):
    (folder / "labels.txt").write_text(listed)
    said = "not read: labels.txt" in _notes(folder)
    assert said != agrees


def test_a_list_may_name_some_of_the_classes(folder):
    (folder / "labels.txt").write_text("0 sky\n2 road")
    for middle, agrees in (("class_1", True), ("tree", False)):
        facts = {"classes": ["sky", middle, "road"]}
        (folder / "classes.json").write_text(json.dumps(facts))
        said = "not read: labels.txt" in _notes(folder)
        assert said != agrees


def test_an_unlabeled_folder_that_is_empty_or_of_another_format(folder):
    for path in (folder / "unlabeled").iterdir():
        path.unlink()
    assert _splits(folder)["train"][1] == []
    (folder / "unlabeled" / "u0.heic").write_text("x")
    assert f"{folder / 'unlabeled'}: holds no image file" in _problems(folder)[0]


def test_folders_of_splits(folder):
    for key, part in (("im00", "train"), ("im01", "train"), ("im02", "val")):
        _move(folder, key, part)
    # What is in none of them stays unused, and is told.
    expected = {
        "train": (["train/im00", "train/im01"], ["u0", "u1"]),
        "val": (["val/im02"], []),
    }
    assert _splits(folder) == expected
    text = "3 images of images/ in none of images/train/, images/val/ and not used"
    assert f"{text}: im03, im04, im05" in _notes(folder)
    _move(folder, "im03", "test")
    assert _splits(folder) == expected | {"test": (["test/im03"], [])}
    # A list goes before a folder, which then is one like others.
    _list(folder, "val", "im04")
    found = _splits(folder)
    assert found["val"] == (["im04"], [])
    assert found["train"] == (["train/im00", "train/im01"], ["u0", "u1"])
    _list(folder, "train", "val/im02", "test/im03")
    (problem,) = _problems(folder)
    assert "train.txt and images/test/ share test/im03" in problem


def test_a_folder_named_train_alone_is_like_any_other(folder):
    _move(folder, "im00", "train")
    _list(folder, "val", "im01")
    assert _splits(folder)["train"][0] == ["im02", "im03", "im04", "im05", "train/im00"]


def test_a_list_for_testing(folder, tmp_path):
    _list(folder, "val", "im04")
    _list(folder, "test", "images/im05.png masks/im05.png")
    assert _splits(folder) == {
        "train": (["im00", "im01", "im02", "im03"], ["u0", "u1"]),
        "val": (["im04"], []),
        "test": (["im05"], []),
    }
    source = registry.read_source("folder", str(folder))
    report = check.check_source(source)
    registry.prepare(source, report.present, str(tmp_path / "data"))
    found = build.build_eval(config_for(tmp_path / "data", "folder"), "test")
    assert found.ids == ("im05",)
    _list(folder, "test", "im04", "im05", "u0")
    bare, shared = _problems(folder)
    assert "test.txt: names images without a mask: u0" in bare
    assert "val.txt and test.txt share im04" in shared


def test_lists_of_labeled_and_unlabeled_images(folder):
    _list(folder, "val", "im05")
    _list(folder, "labeled", "im00", "im01")
    # Alone, it leaves the rest unlabeled.
    assert _splits(folder)["train"] == (
        ["im00", "im01"],
        ["im02", "im03", "im04", "u0", "u1"],
    )
    _list(folder, "unlabeled", "im02", "u1")
    (folder / "masks" / "im02.png").unlink()  # Not needed.
    assert _splits(folder)["train"] == (["im00", "im01"], ["im02", "u1"])
    notes = _notes(folder)
    assert "2 images of images/ in none of val.txt, labeled.txt" in notes
    assert "1 image of unlabeled/ in none of" in notes
    (folder / "labeled.txt").unlink()
    assert _splits(folder)["train"] == (
        ["im00", "im01", "im03", "im04"],
        ["im02", "u1"],
    )


def test_an_image_is_for_one_thing(folder):
    _list(folder, "val", "im05")
    _list(folder, "train", "im00", "im01", "im02")
    _list(folder, "labeled", "im00", "im03")
    _list(folder, "unlabeled", "im00", "im01", "im05")
    text = "\n".join(_problems(folder))
    for message in (
        "val.txt and unlabeled.txt share im05",
        "labeled.txt and unlabeled.txt share im00",
        "labeled.txt names images that train.txt lacks: im03",
    ):
        assert message in text


def test_one_labeled_image(tmp_path):
    root = make_folder(tmp_path / "src", images=1)
    problem, *_ = _problems(root)
    assert "only one labeled image for training and validation (im00)" in problem


def test_equal_images_are_told(folder, capsys):
    _list(folder, "val", "im05")
    # Equal in every pixel, in another encoding.
    pixels = decode.decode_image((folder / "images" / "im05.png").read_bytes(), 3)
    pixels.save(folder / "images" / "im00.png", compress_level=0)
    pixels.save(folder / "unlabeled" / "u0.png")
    first = (folder / "images" / "im02.png").read_bytes()
    (folder / "images" / "im03.png").write_bytes(first)
    check_data.main(["--dataset=folder", f"--source={folder}"])
    out = capsys.readouterr().out
    assert "warning: folder: 1 image in two splits" in out
    assert ": train: im00 = train: u0 = val: im05;" in out
    assert "note: folder: 1 image more than once in a split" in out
    assert ": im02 = im03\n" in out


def test_links_are_followed_once(folder, tmp_path):
    _list(folder, "val", "im05")
    expected = _splits(folder)
    for part in ("images", "masks", "unlabeled"):  # Elsewhere, as a whole and in part.
        os.rename(folder / part, tmp_path / part)
        (folder / part).symlink_to(tmp_path / part)
    assert _splits(folder) == expected
    os.rename(tmp_path / "unlabeled" / "u0.png", tmp_path / "u0.png")
    (tmp_path / "unlabeled" / "u0.png").symlink_to(tmp_path / "u0.png")
    assert _splits(folder) == expected
    inner = tmp_path / "images" / "again"
    for target, message in (
        (
            tmp_path / "images",
            f"again: a link makes it the same folder as {folder}/images",
        ),
        (tmp_path, f"again: a link to {tmp_path}, which holds {folder}/images"),
    ):
        inner.symlink_to(target)
        assert any(message in problem for problem in _problems(folder))
        inner.unlink()
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "absent.png")
    (problem,) = _problems(folder)
    assert problem.endswith(
        f"a symbolic link to {tmp_path}/absent.png, which does not exist"
    )
    (tmp_path / "images" / "gone.png").unlink()
    os.mkfifo(tmp_path / "images" / "pipe.png")
    assert "pipe.png: not a file; a pipe or device" in _problems(folder)[0]


def test_names_that_are_not_utf8(folder, capsys):
    for part in ("images", "masks"):
        source = bytes(folder / part)
        os.rename(source + b"/im00.png", source + b"/\xb5\xda1.png")
    with pytest.raises(SystemExit) as stop:
        check_data.main(["--dataset=folder", f"--source={folder}"])
    capsys.readouterr()
    heading, image, mask = str(stop.value).splitlines()
    assert heading == "error: 2 problems"
    assert f"1 names are not UTF-8: {folder}/images/\\xb5\\xda1.png; rename" in image
    assert f"1 names are not UTF-8: {folder}/masks/\\xb5\\xda1.png; rename" in mask


def test_names_with_control_characters_are_refused_and_escaped(folder, capsys):
    for part in ("images", "masks"):
        os.rename(folder / part / "im00.png", folder / part / "a\n\x1b[31mb.png")
    with pytest.raises(SystemExit) as stop:
        check_data.main(["--dataset=folder", f"--source={folder}"])
    capsys.readouterr()
    heading, problem = str(stop.value).splitlines()
    assert heading == "error: 1 problem"
    assert f"{folder}/images/a\\n\\x1b[31mb.png; rename" in problem


def test_class_names_with_control_characters_are_refused_and_escaped(folder, capsys):
    (folder / "classes.json").write_text('{"classes": ["a", "b\\u001b[31m", "c\\nd"]}')
    with pytest.raises(SystemExit) as stop:
        check_data.main(["--dataset=folder", f"--source={folder}"])
    out = capsys.readouterr().out
    heading, problem = str(stop.value).splitlines()
    assert heading == "error: 1 problem"
    assert problem.endswith("control characters: 'b\\x1b[31m', 'c\\nd'")
    assert "\x1b" not in out + problem


def test_names_in_either_form_of_unicode(folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    os.rename(folder / "images" / "im00.png", folder / "images" / f"{decomposed}.png")
    os.rename(folder / "masks" / "im00.png", folder / "masks" / f"{composed}.png")
    for name in (composed, decomposed):
        _list(folder, "val", name)
        assert _splits(folder)["val"] == ([composed], [])
