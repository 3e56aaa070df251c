"""Pascal VOC and Cityscapes: prepared, checked before and after, pixel by pixel."""

import dataclasses
import io
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from launch import check_data, prepare_data
from mpmc_jax.data import build, decode, lists, registry
from mpmc_jax.data.builders import cityscapes, voc
from mpmc_jax.data.dataset import DatasetFacts, open_dataset
from mpmc_jax.data.masks import decode_mask
from mpmc_jax.pixels import RGB
from tests.support import trees
from tests.support.data_sets import config_for


def run(name, root, data_dir, capsys):
    """Checks, prepares, checks again; returns the facts and what was printed."""
    named = [f"--dataset={name}", f"--source={root}"]
    check_data.main(named)
    prepare_data.main([*named, f"--data_dir={data_dir}"])
    out = capsys.readouterr().out
    check_data.main([f"--dataset={name}", f"--data_dir={data_dir}"])
    assert "No problem found." in capsys.readouterr().out
    return open_dataset(str(data_dir), name), out


def masks(info):
    return {
        key: decode.record_label(record["mask"])
        for split, keys in info.ids.items()
        for key, record in zip(keys, info.records(split), strict=True)
    }


def assert_same(found, expected, ids):
    assert sorted(found) == sorted(ids)
    for key in ids:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def test_voc_palette():
    colors = voc.palette()
    assert colors[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert colors[15] == (192, 128, 128)
    assert colors[20] == (0, 64, 128)
    assert voc.CLASSES[15] == "person"


@pytest.mark.parametrize("add", [trees.add_aug, trees.add_sbd, trees.add_archive])
def test_voc_with_sbd(add, tmp_path, capsys):
    expected = trees.make_voc(tmp_path / "src")
    add(tmp_path / "src")
    info, out = run("voc", tmp_path / "src", tmp_path / "data", capsys)
    assert info.ids["train"] == trees.VOC_TRAIN + trees.SBD_ONLY
    assert info.ids["val"] == trees.VOC_VAL
    assert_same(masks(info), expected, expected)
    assert info.facts.partial
    assert "10582" in out


@pytest.mark.parametrize("place", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_with_sbd_beside(place, tmp_path):
    trees.make_voc(tmp_path)
    trees.add_aug(tmp_path)
    data = registry.read_source("voc", str(tmp_path / place))
    assert data.problems == ()
    assert len(data.splits["train"]) == 7


def test_voc_without_sbd(tmp_path, capsys):
    expected = trees.make_voc(tmp_path / "src")
    info, out = run("voc", tmp_path / "src", tmp_path / "data", capsys)
    assert info.ids["train"] == trees.VOC_TRAIN
    assert_same(masks(info), expected, trees.VOC_TRAIN + trees.VOC_VAL)
    assert "splits of 10582 images need it" in out
    assert f"{'train':>8}{3:>8}{1464:>11}" in out


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(kind, tmp_path, capsys):
    expected = trees.make_cityscapes(tmp_path / "src", kind)
    if kind == "labelIds":  # Both where both exist: the train ids are preferred.
        trees.make_cityscapes(tmp_path / "src", "labelTrainIds")
        for path in (tmp_path / "src").rglob("frankfurt*labelTrainIds.png"):
            path.unlink()
    info, out = run("cityscapes", tmp_path / "src", tmp_path / "data", capsys)
    assert f"*_gtFine_{kind}.png" in out
    assert_same(masks(info), expected, expected)
    assert f"{'train':>8}{2:>8}{2975:>11}" in out
    key = info.ids["train"][0]
    city = key.split("_")[0]
    path = tmp_path / "src" / "leftImg8bit" / "train" / city / f"{key}.png"
    content = info.records("train")[0]["image"]
    np.testing.assert_array_equal(
        decode.decode_array(content, RGB), np.asarray(Image.open(path))
    )
    assert Image.open(io.BytesIO(content)).format == "BMP"
    line = f"leftImg8bit/train/{city}/{key}.png gtFine/train/{city}/x.png"
    assert lists.resolve(line, set(info.ids["train"])) == key


def test_cityscapes_table():
    assert len(cityscapes.CLASSES) == len(cityscapes.LABEL_IDS) == 19
    raw = np.arange(34, dtype=np.uint8)[None]
    mapped = decode_mask(cityscapes.to_train_ids(decode.encode_png(raw)))[0]
    assert mapped[[7, 24, 26, 33]].tolist() == [0, 11, 13, 18]
    assert (mapped == 255).sum() == 34 - 19


def sample_root():
    folder = os.environ.get("MPMC_TEST_DATA")
    root = pathlib.Path(folder or "/nowhere") / "voc_sample"
    if not root.is_dir():
        pytest.skip("MPMC_TEST_DATA is unset or holds no voc_sample")
    return root


def test_real_voc_sample(tmp_path, capsys):
    root = sample_root()
    info, _ = run("voc", root, tmp_path, capsys)
    assert [len(info.ids[split]) for split in ("train", "val")] == [120, 40]
    assert info.facts.partial
    tree = root / "VOCdevkit" / "VOC2012"
    for key, mask in masks(info).items():
        own = tree / "SegmentationClass" / f"{key}.png"
        other = tree / "SegmentationClassAug" / f"{key}.png"
        with Image.open(own if own.is_file() else other) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(mask, np.asarray(image), err_msg=key)
    config = config_for(tmp_path, "voc", split="1_4")
    config.data.allow_absent_classes = True  # Animals only.
    drawn = build.build_split(config, info)
    assert len(drawn.labeled) == 30
    own = (tree / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    rest = [key for key in info.ids["train"] if key not in own]
    for name, keys in (("labeled", own), ("unlabeled", rest)):
        lines = [f"JPEGImages/{key}.jpg SegmentationClass/{key}.png" for key in keys]
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(lines))
        config.data[f"{name}_ids"] = str(path)
    listed = build.build_split(config, info)
    assert listed.labeled == tuple(own)
    assert listed.unlabeled == tuple(rest)


def test_published_lists_are_what_the_rule_gives():
    """The 10582 are disjoint from val, hold the 1464, and sort as ids do."""
    splits = sample_root().parent / "splits" / "pascal"
    train, val, own = (
        [line.split()[0] for line in lists.read_lines(splits / name)]
        for name in ("train_aug.txt", "val.txt", "1464/labeled.txt")
    )
    assert {"train": len(train), "val": len(val)} == voc.EXPECTED
    assert len(own) == voc.EXPECTED_WITHOUT_SBD["train"]
    assert not set(train) & set(val)
    assert set(own) < set(train)


def test_facts_of_a_partial_data_set_go_through_a_manifest(tmp_path, capsys):
    trees.make_voc(tmp_path / "src")
    facts = run("voc", tmp_path / "src", tmp_path / "data", capsys)[0].facts
    manifest = json.loads(json.dumps(dataclasses.asdict(facts)))
    assert manifest["partial"] is True
    assert DatasetFacts.read(manifest) == facts


def test_a_whole_data_set_is_not_partial(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(voc, "EXPECTED_WITHOUT_SBD", {"train": 3, "val": 2})
    trees.make_voc(tmp_path / "src")
    info, out = run("voc", tmp_path / "src", tmp_path / "data", capsys)
    assert not info.facts.partial
    assert "PARTIAL" not in out
    facts = json.loads((info.directory / "metadata.json").read_text())
    assert facts["partial"] is False
