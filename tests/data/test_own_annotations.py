"""Masks drawn from the JSON of labelme, Supervisely and COCO."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from matplotlib.path import Path
from PIL import Image

from launch import prepare_data
from mpmc_jax.data import check, masks, registry
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.own import shapes
from mpmc_jax.data.raster_formats import UnreadableImage
from tests.support import json_fuzz

SIZE = (20, 30)
SQUARE = [[4, 5], [14, 5], [14, 15], [4, 15]]
HOLE = [[7, 8], [10, 8], [10, 11], [7, 11]]


def _expected(value=1, hole=False):
    label = np.zeros(SIZE, np.uint8)
    label[5:15, 4:14] = value
    if hole:
        label[8:11, 7:10] = 0
    return label


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path.name)))
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path)


def _png(inside):
    stream = io.BytesIO()
    Image.fromarray(inside.astype(np.uint8) * 255).save(stream, "PNG")
    return stream.getvalue()


def _labels(root, classes=()):
    source = registry.read_source("folder", str(root), classes)
    assert check.check_source(source).problems == ()
    return {
        sample.id: masks.decode_mask(source_lib.read_bytes(sample.mask))
        for split in source.splits.values()
        for sample in split
        if sample.mask is not None
    }


def test_a_polygon_holds_the_pixels_whose_centers_are_inside():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :50] + 0.5
    centers = np.stack([columns.ravel(), rows.ravel()], axis=1)
    for corners in range(3, 13):
        ring = rng.uniform(-5, 55, (corners, 2))
        found = np.zeros((40, 50), np.uint8)
        shapes.fill(found, [ring.tolist()], 1)
        # Matplotlib's winding rule agrees with ours for simple polygons.
        angles = np.arctan2(*(ring - ring.mean(0)).T)
        ring = ring[np.argsort(angles)]
        found[:] = 0
        shapes.fill(found, [ring.tolist()], 1)
        expected = Path(ring).contains_points(centers).reshape(40, 50)
        np.testing.assert_array_equal(found, expected)


def _labelme(root):
    drawn = {
        "a": [{"label": "leaf", "points": SQUARE, "shape_type": "polygon"}],
        "b": [{"label": "leaf", "points": [SQUARE[0], SQUARE[2]]}],
        "c": [
            {"label": "stem", "points": [[0, 0], [30, 20]], "shape_type": "rectangle"},
            {"label": "_background_", "points": SQUARE},
            {"label": "x", "points": [[1, 1]], "shape_type": "point"},
        ],
        "d": [
            {
                "label": "leaf",
                "points": [[4, 5], [13, 14]],
                "shape_type": "mask",
                "mask": base64.b64encode(_png(np.ones((10, 10)))).decode(),
            }
        ],
    }
    drawn["b"][0]["shape_type"] = "rectangle"
    for name, listed in drawn.items():
        _image(root / "images" / f"{name}.png")
        facts = {"shapes": listed, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (root / "images" / f"{name}.json").write_text(json.dumps(facts))
    _image(root / "images" / "bare.png")


def test_labelme(tmp_path):
    _labelme(tmp_path)
    found = _labels(tmp_path, ("background", "leaf", "stem"))
    for name in "abd":
        np.testing.assert_array_equal(found[name], _expected())
    np.testing.assert_array_equal(found["c"], np.where(_expected(), 0, 2))
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    notes = "\n".join(source.notes)
    assert "1 image without annotations used as unlabeled: bare" in notes
    assert "1 shape of type 'point' not drawn, in " in notes and "c.json" in notes
    # Classes that are not asked for are void, and so is the rest without background.
    assert set(np.unique(_labels(tmp_path, ("background", "leaf"))["c"])) == {0, 255}
    found = _labels(tmp_path, ("leaf", "stem"))["a"]
    np.testing.assert_array_equal(found, np.where(_expected(), 0, 255))


def _supervisely(root):
    listed = [
        {"title": "leaf", "color": "#FF0102"},
        {"title": "bg", "color": "#000000"},
    ]
    (root / "meta.json").write_text(json.dumps({"classes": listed}))
    vertices = [[4, 5], [13, 5], [13, 14], [4, 14]]
    packed = base64.b64encode(zlib.compress(_png(np.ones((10, 10))))).decode()
    objects = {
        "a": [{"geometryType": "polygon", "points": {"exterior": vertices}}],
        "b": [{"geometryType": "bitmap", "bitmap": {"data": packed, "origin": [4, 5]}}],
        "c": [
            {
                "geometryType": "rectangle",
                "points": {"exterior": [vertices[0], vertices[2]]},
            }
        ],
    }
    for name, drawn in objects.items():
        _image(root / "ds 0" / "img" / f"{name}.png")
        path = root / "ds 0" / "ann" / f"{name}.png.json"
        path.parent.mkdir(exist_ok=True)
        drawn = [{"classTitle": "leaf", **each} for each in drawn]
        size = {"height": SIZE[0], "width": SIZE[1]}
        path.write_text(json.dumps({"size": size, "objects": drawn}))


def test_supervisely(tmp_path):
    _supervisely(tmp_path)
    prepare_data.main(
        [
            "--dataset=folder",
            f"--source={tmp_path}",
            "--init",
            f"--data_dir={tmp_path / 'data'}",
        ]
    )
    facts = open_dataset(str(tmp_path / "data"), "folder").facts
    assert facts.class_names == ("background", "leaf")
    assert facts.palette == ((0, 0, 0), (255, 1, 2))
    found = _labels(tmp_path)
    # Pixels within half a pixel of the vertices' centers are outside.
    np.testing.assert_array_equal(found["ds 0/a"][5:14, 4:13], 1)
    assert 81 <= found["ds 0/a"].sum() <= 100
    np.testing.assert_array_equal(found["ds 0/b"], _expected())
    np.testing.assert_array_equal(found["ds 0/c"], _expected())


def _coco(root, segmentation, place="annotations/instances.json", images="images"):
    for i in range(3):
        _image(root / images / f"{i}.png")
    facts = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]}
            for i in range(3)
        ],
        "categories": [{"id": 0, "name": "plants"}, {"id": 7, "name": "leaf"}],
        "annotations": [
            {"image_id": i, "category_id": 7, "area": 1, "segmentation": segmentation}
            for i in range(2)
        ],
    }
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "place, images",
    [
        ("annotations/instances.json", "images"),
        ("train/_annotations.coco.json", "train"),
        ("labels.json", "images/a b"),
    ],
)
def test_coco(place, images, tmp_path):
    _coco(tmp_path, [np.ravel(SQUARE).tolist()], place, images)
    found = _labels(tmp_path, ("background", "leaf"))
    assert len(found) == 3
    for key, label in found.items():
        expected = np.zeros(SIZE) if key.endswith("2") else _expected()
        np.testing.assert_array_equal(label, expected)
    prepare_data.main(
        [
            "--dataset=folder",
            f"--source={tmp_path}",
            "--init",
            f"--data_dir={tmp_path / 'data'}",
        ]
    )
    facts = json.loads((tmp_path / "classes.json").read_text())
    assert facts == {"classes": ["background", "leaf"]}


@pytest.mark.parametrize("packed", [False, True])
def test_run_lengths_of_coco(packed, tmp_path):
    expected = _expected(hole=True)
    expected[0, 29] = 1
    changes = np.flatnonzero(np.diff(expected.ravel(order="F")))
    counts = np.diff([-1, *changes, expected.size - 1]).tolist()
    if packed:  # By pycocotools 2.0.11.
        counts = "e2::0000II17OI17OI176000000W9GRG"
    _coco(tmp_path, {"size": SIZE, "counts": counts})
    found = _labels(tmp_path, ("background", "leaf"))
    np.testing.assert_array_equal(found["0"], expected)
    _coco(tmp_path, {"size": SIZE, "counts": [1, 2]})
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    problem, *_ = check.check_source(source).problems
    assert "a shape of 'leaf' cannot be drawn" in problem
    assert "instances.json (" in problem


def test_files_that_are_no_annotations(tmp_path):
    _labelme(tmp_path)
    (tmp_path / "images" / "a.json").write_text("{")
    (tmp_path / "images" / "b.json").write_text('{"shapes": [{}]}')
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    not_json, no_shapes = sorted(source.problems)
    assert "a.json: not JSON" in not_json and "b.json: not a file of" in no_shapes
    drawing = shapes.Drawing(SIZE, (shapes.Shape("leaf", bitmap="AAAA"),))
    with pytest.raises(UnreadableImage, match="a shape of 'leaf' cannot be drawn"):
        source_lib.read_bytes(drawing.as_mask("a.json", {"leaf": 1}, 0))


@pytest.mark.parametrize(
    "write, file",
    [
        (_labelme, "images/c.json"),
        (_labelme, "images/d.json"),
        (_supervisely, "meta.json"),
        (_supervisely, "ds 0/ann/a.png.json"),
        (_supervisely, "ds 0/ann/b.png.json"),
        (lambda root: _coco(root, [np.ravel(SQUARE).tolist()]), "coco"),
        (lambda root: _coco(root, {"size": SIZE, "counts": [9, 591]}), "coco"),
        (lambda root: _coco(root, {"size": SIZE, "counts": "e2::"}), "coco"),
    ],
)
def test_odd_json_never_ends_in_a_traceback(write, file, tmp_path):
    write(tmp_path)
    path = tmp_path / file.replace("coco", "annotations/instances.json")
    for _, text in json_fuzz.mutations(path.read_text()):
        path.write_text(text)
        source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
        check.check_source(source)


def test_images_without_shapes_and_boxes_without_outlines_are_told(tmp_path):
    _coco(tmp_path, [np.ravel(SQUARE).tolist()])
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    assert source.problems == ()
    blank = next(note for note in source.notes if "without a shape" in note)
    assert "1 image of the COCO annotations" in blank and ": 2; if they" in blank
    (tmp_path / "unlabeled.txt").write_text("2\n")
    assert "2" not in _labels(tmp_path, ("background", "leaf"))
    _coco(tmp_path, [])
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    assert "2 annotations without an outline" in source.problems[0]
    assert "with ids 0, 1; draw" in source.problems[0]


def test_faults_of_a_coco_file_are_named(tmp_path):
    _coco(tmp_path, [np.ravel(SQUARE).tolist()])
    path = tmp_path / "annotations" / "instances.json"
    facts = json.loads(path.read_text())
    facts["annotations"][1]["category_id"] = 9
    path.write_text(json.dumps(facts))
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    assert f"{path}: annotations have the category_id 9, which" in source.problems[0]
    path.write_text(json.dumps(facts)[:-9])
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    (damaged,) = source.problems
    assert "not JSON" in damaged and damaged.endswith("; copy or export it again")


def test_holes_and_names_of_absent_files(tmp_path):
    label = np.zeros(SIZE, np.uint8)
    shapes.fill(label, [SQUARE, HOLE], 1)
    np.testing.assert_array_equal(label, _expected(hole=True))
    _coco(tmp_path, [np.ravel(SQUARE).tolist()])
    (tmp_path / "images" / "1.png").unlink()
    source = registry.read_source("folder", str(tmp_path), ("background", "leaf"))
    assert "names 1 absent image: 1.png" in source.problems[0]
