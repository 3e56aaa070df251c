import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from mpmc_jax.data import check, masks, registry, source, verify
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.pixels import RGB
from tests.support.data_sets import make_folder, write_image


def _problems(root, classes=()):
    return check.check_source(
        registry.read_source("folder", str(root), classes)
    ).problems


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "src")


def _label(root, name="im03"):
    return root / "masks" / f"{name}.png"


def test_a_valid_folder(folder):
    data = registry.read_source("folder", str(folder))
    report = check.check_source(data)
    assert report.problems == ()
    assert data.pixels == RGB
    assert len(data.splits["train"]) == 11
    assert len(data.splits["val"]) == 1
    assert report.pixels.sum() == 12 * 20 * 24
    assert set(np.flatnonzero(report.images)) == {0, 1, 2, 255}
    assert report.present["im03"] == (0, 1, 2)
    table = report.table(data.class_names).splitlines()
    assert len(table) == 5
    assert "(void)" in table[-1]
    assert str(report.pixels[1]) in table[2]


@pytest.mark.parametrize(
    "values, mode, mend",
    [
        ([1, 2, 3], None, "start at 1"),
        ([0, 1, 3], None, "void must be 255, not 3"),
        ([0, 7, 9], "P", "palette PNG"),
        ([0, 7, 9], None, r"class indices 0\.\.2"),
    ],
)
def test_mask_values_above_the_class_count(folder, values, mode, mend):
    label = np.resize(np.array(values, np.uint8), (20, 24))
    write_image(_label(folder), label, mode)
    (problem,) = _problems(folder)
    assert problem.startswith(str(_label(folder)))
    for value in values:
        if value > 2:
            assert str(value) in problem
    assert re.search(mend, problem)


def test_other_size(folder):
    write_image(_label(folder), np.zeros((24, 20), np.uint8))
    (problem,) = _problems(folder)
    assert "20x24" in problem
    assert "24x20" in problem
    assert "im03.png" in problem


def test_unreadable_files_are_all_named(folder):
    image = folder / "images" / "im00.png"
    image.write_bytes(image.read_bytes()[:300])
    (folder / "images" / "im01.png").write_text("hello")
    _label(folder).write_bytes(b"")
    problems = _problems(folder)
    assert len(problems) == 3
    expected = (
        ("im00", "truncated or damaged"),
        ("im01", "not a PNG, JPEG, BMP, TIFF, WebP or .npy file"),
        ("im03", "an empty file"),
    )
    for (name, reason), problem in zip(expected, sorted(problems), strict=True):
        assert name in problem
        assert reason in problem


def test_sixteen_bit_images_and_labels(folder):
    deep = Image.fromarray(np.full((20, 24), 4000, np.uint16))
    deep.save(folder / "images" / "im02.png")
    deep.save(_label(folder))
    image, mask = sorted(_problems(folder))
    assert "8 bits" in image
    assert "values 4000 are neither a class nor void" in mask
    Image.fromarray(np.full((20, 24), 2, np.uint16)).save(_label(folder))
    np.testing.assert_array_equal(masks.decode_mask(_label(folder).read_bytes()), 2)


def test_pairs_that_do_not_match(folder):
    _label(folder).rename(folder / "masks" / "stray.png")
    lonely, orphan = sorted(_problems(folder), key=lambda line: "stray" in line)
    assert "im03.png" in lonely
    assert "unlabeled/" in lonely
    assert "stray.png" in orphan


@pytest.mark.parametrize(
    "facts, message",
    [
        ({}, "no class names"),
        ({"classes": ["a", "b", "a"]}, "repeats a"),
        ({"classes": ["a", "b", "c"], "colors": []}, "unknown keys colors"),
        ({"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}, "1 color for 3"),
        ({"classes": ["a", "b", "c"], "palette": [[0, 0, 999]] * 3}, "not 8-bit"),
        (
            {"classes": ["a", "b", "c"], "palette": [[0, 0, 9]] * 3},
            "colors with two meanings",
        ),
        (["a", "b"], "not an object"),
        ({"classes": "road"}, "not a list of names: 'road'"),
        ({"classes": [1, 2]}, "not a list of names: [1, 2]"),
        ({"classes": ["a", "b"], "palette": [1, 2]}, '"palette" is not a list of'),
        ({"classes": ["a", "b"], "palette": 3}, '"palette" is not a list of'),
    ],
)
def test_bad_class_files(folder, facts, message):
    (folder / "classes.json").write_text(json.dumps(facts))
    assert any(message in problem for problem in _problems(folder))


def test_class_file_that_is_not_json(folder):
    (folder / "classes.json").write_text("{")
    assert any("not JSON" in problem for problem in _problems(folder))


def test_class_names_by_hand(folder):
    (folder / "classes.json").unlink()
    assert _problems(folder, ("x", "y", "z")) == ()
    assert any("no class names" in problem for problem in _problems(folder))


def test_color_masks_need_a_palette(folder):
    label = np.resize(np.arange(3), (20, 24))
    colors = np.array([[10, 0, 0], [0, 10, 0], [224, 224, 192]], np.uint8)
    for path in (folder / "masks").iterdir():
        write_image(path, colors[label])
    problems = _problems(folder)
    assert len(problems) == 12
    assert all("give the palette" in problem for problem in problems)
    facts = {"classes": ["a", "b", "c"], "palette": [[10, 0, 0], [0, 10, 0], [1, 1, 1]]}
    (folder / "classes.json").write_text(json.dumps(facts))
    assert all("(224, 224, 192)" in problem for problem in _problems(folder))
    facts["void"] = [[224, 224, 192]]
    (folder / "classes.json").write_text(json.dumps(facts))
    data = registry.read_source("folder", str(folder))
    assert check.check_source(data).problems == ()
    found = masks.read_mask(_label(folder).read_bytes(), data.masks)
    np.testing.assert_array_equal(found.label_hw, np.where(label == 2, 255, label))


def test_lists_of_a_folder(folder):
    (folder / "val.txt").write_text("images/im01.png masks/im01.png\nim02")
    data = registry.read_source("folder", str(folder))
    assert [s.id for s in data.splits["val"]] == ["im01", "im02"]
    assert len(data.splits["train"]) == 10
    (folder / "train.txt").write_text("im02\nim05\nim05\nim99\n")
    text = "\n".join(_problems(folder))
    for message in ("absent files: im99", "repeats im05", "share im02"):
        assert message in text


def test_zero_labeled_images(folder):
    (folder / "val.txt").write_text("im00")
    (folder / "train.txt").write_text("\n")
    (problem,) = _problems(folder)
    assert "no labeled image in split 'train'" in problem


def test_missing_and_empty_folders(tmp_path):
    absent = str(tmp_path / "absent")
    for path, message in (("", "--source=DIR is missing"), (absent, "no such folder")):
        with pytest.raises(FileNotFoundError, match=message):
            registry.read_source("camvid", path)
    with pytest.raises(FileNotFoundError, match="empty"):
        registry.read_source("folder", str(tmp_path))
    (tmp_path / "images").mkdir()
    text = "\n".join(_problems(tmp_path, ("a", "b")))
    assert "holds no image file" in text
    assert f"{tmp_path / 'masks'}: no such folder" in text


def test_camvid_lists(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"i{i}.png", np.zeros((4, 4, 3), np.uint8))
        write_image(tmp_path / f"m{i}.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "train.txt").write_text("i0.png m0.png\ni1.png m1.png\n")
    (tmp_path / "val.txt").write_text("i2.png m2.png")
    data = registry.read_source("camvid", str(tmp_path))
    assert check.check_source(data).problems == ()
    (tmp_path / "train.txt").write_text(
        "i0.png m0.png\ni0.png m0.png\ni7.png m1.png\ni1"
    )
    (tmp_path / "val.txt").write_text("i0.png m0.png")
    problems = "\n".join(registry.read_source("camvid", str(tmp_path)).problems)
    for message in (
        "i7.png",
        "repeats i0",
        "not an image and a mask: 'i1'",
        "share i0",
    ):
        assert message in problems


def _write_camvid(root, rows):
    """Noise and masks of sky (0) with void (11) for each (split, folder, stem)."""
    rng = np.random.default_rng(0)
    lines = {"train": [], "val": []}
    for split, folder, stem in rows:
        image = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        label = np.zeros((4, 5), np.uint8)
        label[0] = 11
        for part, array in (("", image), ("annot", label)):
            write_image(root / f"{folder}{part}" / f"{stem}.png", array)
        lines[split].append((f"{folder}/{stem}.png", f"{folder}annot/{stem}.png"))
    return lines


def test_camvid_as_segnet_publishes_it(tmp_path):
    rows = [("train", "train", "a"), ("train", "train", "b"), ("val", "val", "c")]
    lines = _write_camvid(tmp_path, rows)
    for split, pairs in lines.items():
        text = "\n".join(f"/SegNet/CamVid/{i} /SegNet/CamVid/{m}" for i, m in pairs)
        (tmp_path / f"{split}.txt").write_text(text)
    data = registry.read_source("camvid", str(tmp_path))
    report = check.check_source(data)
    assert report.problems == ()
    assert [s.id for s in data.splits["train"]] == ["a", "b"]
    assert report.pixels[[0, 11, 255]].tolist() == [45, 0, 15]
    registry.prepare(data, report.present, str(tmp_path / "data"))
    again = verify.check(open_dataset(str(tmp_path / "data"), "camvid"))
    assert again.problems == ()
    assert again.pixels.tolist() == report.pixels.tolist()
    assert f"/SegNet/CamVid/val/c.png becomes {tmp_path}/val/c.png" in data.notes[1]
    # An absent file is named as the list means it.
    (tmp_path / "train" / "a.png").unlink()
    (problem,) = registry.read_source("camvid", str(tmp_path)).problems
    assert problem.endswith(f"train.txt: names absent files: {tmp_path}/train/a.png")


def test_camvid_sequences_with_equal_stems_and_a_list_for_testing(tmp_path):
    decomposed = "se\u0301q2"  # The list has the other form.
    rows = [("train", "seq1", "001"), ("train", decomposed, "001")]
    lines = _write_camvid(tmp_path, [*rows, ("val", "seq3", "001")])
    lines["test"] = [lines["train"].pop()]
    for split, pairs in lines.items():
        text = "\n".join(" ".join(pair) for pair in pairs)
        text = text.replace(decomposed, "s\u00e9q2")
        (tmp_path / f"{split}.txt").write_text(text)
    data = registry.read_source("camvid", str(tmp_path))
    assert check.check_source(data).problems == ()
    assert {split: [s.id for s in part] for split, part in data.splits.items()} == {
        "train": ["seq1/001"],
        "val": ["seq3/001"],
        "test": ["s\u00e9q2/001"],
    }


def test_real_camvid():
    root = os.environ.get("MPMC_TEST_DATA")
    if not root:
        pytest.skip("MPMC_TEST_DATA is not set")
    data = registry.read_source("camvid", str(pathlib.Path(root) / "camvid"))
    assert data.problems == ()
    assert [len(data.splits[split]) for split in ("train", "val")] == [367, 101]
    few = {"train": data.splits["train"][::40], "val": data.splits["val"][::40]}
    report = check.check_source(
        source.Source(data.name, data.class_names, data.palette, RGB, few)
    )
    assert report.problems == ()
    assert report.pixels[: len(data.class_names)].all()
    assert report.pixels.sum() == report.pixels[[*range(11), 255]].sum()


def test_a_list_names_labeled_images_only(folder):
    (folder / "unlabeled").mkdir()
    (folder / "images" / "im03.png").rename(folder / "unlabeled" / "im03.png")
    _label(folder).unlink()
    (folder / "val.txt").write_text("im00\nim03\nim77\n")
    maskless, absent = _problems(folder)
    assert "names images without a mask: im03;" in maskless
    assert "names absent files: im77" in absent


def test_a_lossy_mask_is_called_so(folder):
    void = np.random.default_rng(0).integers(0, 2, (20, 24), dtype=np.uint8) * 255
    _label(folder).unlink()
    Image.fromarray(void).save(folder / "masks" / "im03.jpg")
    (problem,) = _problems(folder)
    assert "im03.jpg" in problem and "store masks as PNG" in problem
