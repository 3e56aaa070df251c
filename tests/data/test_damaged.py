"""Archives half extracted, files damaged or hostile."""

import io
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mpmc_jax.data import check, registry
from tests.support import trees


@pytest.fixture
def voc(tmp_path):
    trees.make_voc(tmp_path)
    return tmp_path


@pytest.fixture
def city(tmp_path):
    trees.make_cityscapes(tmp_path)
    return tmp_path


def problems(name, root):
    return check.check_source(registry.read_source(name, str(root))).problems


def only(name, root):
    (problem,) = problems(name, root)
    return problem


def tree(root):
    return root / "VOCdevkit" / "VOC2012"


def test_voc_files_that_were_not_extracted(voc):
    (tree(voc) / "SegmentationClass" / "2007_000039.png").unlink()
    text = only("voc", voc)
    assert "1 of 3 without mask" in text
    assert "2007_000039; extract the archive again" in text
    (tree(voc) / "SegmentationClass" / "2007_000033.png").unlink()
    (tree(voc) / "JPEGImages" / "2007_000042.jpg").unlink()
    assert len(problems("voc", voc)) == 3


def test_hidden_files_beside_published_ones(voc, city):
    for path in ("JPEGImages/._2007_000032.jpg", "SegmentationClass/._x.png"):
        (tree(voc) / path).write_bytes(b"\0\5\26\7")
    assert problems("voc", voc) == ()
    for folder, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for name in (".ipynb_checkpoints/aachen_1", "aachen/._aachen_1"):
            path = city / folder / "train" / f"{name}_{end}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\0\5\26\7")
    (city / "leftImg8bit" / "test").mkdir()
    data = registry.read_source("cityscapes", str(city))
    assert check.check_source(data).problems == ()
    assert data.notes[1] == f"{city / 'leftImg8bit'}: not read: test"


def test_voc_truncated_files(voc):
    image = tree(voc) / "JPEGImages" / "2007_000039.jpg"
    image.write_bytes(image.read_bytes()[:-400])
    mask = tree(voc) / "SegmentationClass" / "2007_000063.png"
    mask.write_bytes(mask.read_bytes()[:-100])
    first, second = problems("voc", voc)
    assert first.startswith(f"{image}: truncated or damaged")
    assert second.startswith(f"{mask}: truncated or damaged")


def test_a_palette_mask_flattened_to_color(voc):
    path = tree(voc) / "SegmentationClass" / "2007_000039.png"
    Image.open(path).convert("RGB").save(path)
    text = only("voc", voc)
    assert text.startswith(f"{path}: a color mask (PIL mode RGB)")
    assert "converted to RGB, use the original file" in text


def test_pillows_pixel_limit_is_named(voc, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Twice that is refused.
    found = problems("voc", voc)
    assert found
    path = tree(voc) / "JPEGImages" / "2007_000032.jpg"
    assert found[0].startswith(f"{path}: Image size (2240 pixels)")
    assert "Image.MAX_IMAGE_PIXELS" in found[0]


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
def test_an_id_list_of_another_data_set(name, voc):
    path = tree(voc) / "ImageSets" / "Segmentation" / name
    path.write_text("leftImg8bit/train/jena/jena_000078_leftImg8bit.png x\n")
    assert "is it the list of another data set?" in problems("voc", voc)[0]
    path.unlink()
    assert f"{path}: no such id list" in problems("voc", voc)[0]


def test_training_images_that_are_in_val(voc):
    path = tree(voc) / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text("\n".join([*trees.VOC_TRAIN, trees.VOC_VAL[0]]))
    assert f"in val.txt: {trees.VOC_VAL[0]}" in only("voc", voc)


@pytest.mark.parametrize("add", [trees.add_sbd, trees.add_archive, trees.add_aug])
def test_sbd_without_voc(add, tmp_path):
    add(tmp_path)
    text = problems("voc", tmp_path)[0]
    assert "no JPEGImages" in text
    assert "extract VOCtrainval_11-May-2012.tar beside it" in text


def _member(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (
            _member("a.mat", tarfile.SYMTYPE, "/etc/passwd"),
            "is a link to '/etc/passwd'",
        ),
        (_member("a.mat", tarfile.LNKTYPE, "b.mat"), "is a link to 'b.mat'"),
        (_member("/dataset/cls/a.mat"), "has an absolute name"),
        (_member("dataset/cls/../../../a.mat"), "leaves the archive by '..'"),
    ],
)
def test_a_hostile_archive(member, reason, voc):
    trees.add_archive(voc, [member])
    before = sorted(voc.parent.rglob("*"))
    text = only("voc", voc)
    assert f"{voc / 'benchmark.tgz'}: refused, its member {member.name!r}" in text
    assert reason in text
    assert sorted(voc.parent.rglob("*")) == before


def test_a_truncated_archive_and_another_one(voc):
    trees.add_archive(voc)
    path = voc / "benchmark.tgz"
    content = path.read_bytes()
    for wrong in (content[: len(content) // 2], b"<html>404", b""):
        path.write_bytes(wrong)
        assert f"{path}: truncated, or not a .tar.gz" in only("voc", voc)
    with tarfile.open(path, "w:gz"):
        pass
    assert "holds no dataset/cls/*.mat" in only("voc", voc)


def _mat(**fields):
    stream = io.BytesIO()
    scipy.io.savemat(stream, fields)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a MATLAB file"),
        (b"not MATLAB at all" * 40, "not a MATLAB file"),
        (_mat(GTinst=1), "lacks GTcls.Segmentation"),
        (_mat(GTcls={"Boundaries": 1}), "lacks GTcls.Segmentation"),
        (_mat(GTcls={"Segmentation": np.zeros((4, 4))}), "is float64 (4, 4), not a"),
        (trees.mat_bytes(np.zeros((40, 56), np.uint8))[:-90], "not a MATLAB file"),
        # 17 kB on disk.
        (
            trees.mat_bytes(np.zeros((4200, 4200), np.uint8)),
            "refused: it decompresses to more",
        ),
    ],
)
def test_a_wrong_mat(content, reason, voc):
    trees.add_sbd(voc)
    path = voc / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000002.mat"
    path.write_bytes(content)
    text = only("voc", voc)
    assert text.startswith(f"{path}: ")
    assert reason in text


def test_cityscapes_half_extracted(city):
    (city / "leftImg8bit" / "train" / "jena").mkdir()
    next(city.rglob("aachen*labelIds.png")).unlink()
    next(city.rglob("frankfurt*leftImg8bit.png")).unlink()
    found = registry.read_source("cityscapes", str(city)).problems
    assert any("cities without images" in text and "jena" in text for text in found)
    assert any("no mask for 1 of 2 images" in text for text in found)
    assert any("no image for 1 mask:" in text for text in found)
    empty = city / "empty"
    (empty / "gtFine").mkdir(parents=True)
    found = registry.read_source("cityscapes", str(empty)).problems
    assert f"{empty / 'leftImg8bit' / 'train'}: no such folder" in found[0]


@pytest.mark.parametrize(
    ("kind", "other", "reason"),
    [
        ("labelIds", "labelTrainIds", "rename to *_gtFine_labelIds.png"),
        ("labelTrainIds", "labelIds", "rename to *_gtFine_labelTrainIds.png"),
    ],
)
def test_one_kind_of_mask_under_the_name_of_the_other(kind, other, reason, tmp_path):
    trees.make_cityscapes(tmp_path, kind)
    for path in sorted((tmp_path / "gtFine").rglob("*.png")):
        path.rename(path.with_name(path.name.replace(kind, other)))
    found = problems("cityscapes", tmp_path)
    assert len(found) == 3
    assert all(reason in text and other in text for text in found)
