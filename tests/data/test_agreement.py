"""What the masks of a data set must agree on."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from mpmc_jax.data import check, registry
from tests.data.test_masks import (
    LABEL,
    RED_GREEN,
    declare,
    encoded,
    image,
    paletted,
    problems,
    write_all,
)
from tests.support.data_sets import make_folder


@pytest.fixture
def folder(tmp_path):
    """Twelve masks of 0, 1, 2 and 255, see `make_folder`."""
    return make_folder(tmp_path / "src")


def test_palettes_that_differ_are_told_where_no_colors_are_named(folder):
    palettes = ([*RED_GREEN], [RED_GREEN[i] for i in (0, 2, 1)])

    def convert(number, label):
        return encoded(paletted(label % 3, palettes[number == 7]))

    write_all(folder, convert)
    (problem,) = problems(folder)
    assert "im07.png: color (0, 255, 0) has index 1" in problem
    assert "and 2 in that of" in problem and "im00.png" in problem


def test_masks_in_two_conventions_are_named(folder):
    declare(folder, palette=RED_GREEN)

    def convert(number, label):
        label = label % 3
        if number != 4:
            return encoded(image(np.array(RED_GREEN, np.uint8)[label]))
        return encoded(image(label))

    write_all(folder, convert)
    (problem,) = problems(folder)
    assert "im04.png: values are the classes" in problem
    assert "im00.png colors are" in problem


def test_a_foreground_of_255_among_masks_of_classes_is_asked_about(folder):
    def convert(number, label):
        label = label % 2
        return encoded(image(label * 255 if number == 5 else label))

    write_all(folder, convert)
    (problem,) = problems(folder)
    assert "im05.png: holds 0 and 255, but masks of other classes" in problem
    assert '"void": [255]' in problem
    declare(folder, void=[255])
    assert problems(folder) == ()


def test_masks_of_0_and_255_alone(folder):
    write_all(folder, lambda number, label: encoded(image(label % 2 * 255)))
    (problem,) = problems(folder)
    assert "masks hold 0 and 255 and nothing else" in problem
    assert "store class indices 0..2" in problem
    declare(folder, classes=["ground", "water"])
    (problem,) = problems(folder)
    assert problem.endswith("if it is 'water', write \"binary\": true")
    declare(folder, classes=["ground", "water"], binary=True)
    assert problems(folder) == ()
    declare(folder, classes=["ground", "water"], palette=[[0, 0, 0], [0, 0, 255]])
    (problem,) = problems(folder)
    assert problem.endswith('its color in "palette" is [255,255,255]')
    declare(folder, classes=["ground", "water"], palette=[[0, 0, 0], [255] * 3])
    assert problems(folder) == ()


def test_void_that_no_one_means_as_a_class_is_not_asked_about(folder):
    classes = ["ground", "water"]
    declare(folder, classes=classes)
    void = np.full_like(LABEL, 255)

    def one_void(number, label):
        return encoded(image(void if number == 5 else label % 2))

    write_all(folder, one_void)
    assert problems(folder) == ()

    # "void" values become 255; masks of one class beside them are nothing special.
    def from_one(number, label):
        return encoded(image(np.minimum(label % 2 * (1 + number % 2), 255)))

    write_all(folder, from_one)
    declare(folder, classes=classes, void=[0])
    assert problems(folder) == ()

    # The color of void is named, and some masks hold nothing else but one class.
    def in_color(number, label):
        shown = np.zeros((*label.shape, 3), np.uint8)
        shown[label == 1, 0] = 255 if number else 0
        shown[:3] = 255
        return encoded(image(shown))

    write_all(folder, in_color)
    declare(folder, classes=classes, palette=RED_GREEN[:2], void=[[255, 255, 255]])
    assert problems(folder) == ()


def test_void_of_missing_pixels_is_not_asked_about(folder):
    declare(folder, classes=["ground", "water"], nodata=[-9999])
    write_all(folder, lambda number, label: encoded(image(label % 2 * (number > 0))))
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        picture = np.asarray(Image.open(path), np.float32)
        if number == 0:
            picture[:4] = -9999
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), picture, photometric="rgb")
    report = check.check_source(registry.read_source("folder", str(folder)))
    assert report.problems == ()
    assert report.images[255] == 1


def test_palettes_reordered_beside_void_of_0_are_told(folder):
    palette = np.array([*RED_GREEN, (0, 0, 255)])

    def convert(number, label):
        order = [0, 1, 3, 2] if number == 5 else [0, 1, 2, 3]
        index = np.where(label == 255, 0, label + 1).astype(np.uint8)
        return encoded(paletted(index, palette[order]))

    write_all(folder, convert)
    declare(folder, void=[0])
    (problem,) = problems(folder)
    assert "color (0, 0, 255) has index 2 in its palette, and 3 in" in problem
