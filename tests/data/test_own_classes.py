"""The classes that are found in a user's masks, and their names."""

import json

import numpy as np
import pytest
from PIL import Image

from mpmc_jax.data import check, registry
from mpmc_jax.data.builders import camvid
from mpmc_jax.data.own import names, survey
from tests.support.own_folder import COLORS, LABEL, SIZE, write_image, write_mask

SHIFTED = np.roll(COLORS, 1, axis=0)


@pytest.mark.parametrize(
    "masks, expected",
    [
        ([LABEL], {"classes": ["background", "class_1", "class_2", "class_3"]}),
        ([np.where(LABEL == 3, 255, LABEL).astype(np.uint8)], 3),
        ([np.where(LABEL == 3, 255, 0).astype(np.uint8)], {"binary": True}),
        ([LABEL + 1], {"void": [0], "classes": [f"class_{i}" for i in (1, 2, 3, 4)]}),
        (
            [LABEL * 80],
            {
                "classes": ["background", "class_80", "class_160", "class_240"],
                "palette": [[v] * 3 for v in (0, 80, 160, 240)],
            },
        ),
        (
            [COLORS[LABEL]],
            {"palette": [[0, 0, 0], [0, 0, 200], [0, 200, 0], [200, 0, 0]]},
        ),
        ([(LABEL, COLORS)], {"palette": COLORS.tolist()}),
        # A program that reordered the palettes.
        ([(LABEL, COLORS), (LABEL, SHIFTED)], 4),
        ([LABEL.astype(np.int32)], 4),
    ],
)
def test_classes_are_proposed(masks, expected, tmp_path):
    for i in range(4):
        write_image(tmp_path / "images" / f"{i}.png", i)
        mask = masks[i % len(masks)]
        label, palette = mask if isinstance(mask, tuple) else (mask, None)
        suffix = ".tif" if label.dtype == np.int32 else ".png"
        write_mask(tmp_path / "masks" / f"{i}{suffix}", label, palette)
    found = dict(enumerate(sorted((tmp_path / "masks").iterdir())))
    facts = survey.propose(tmp_path, found).facts
    if isinstance(expected, int):
        assert len(facts["classes"]) == expected
    else:
        assert facts == {"classes": facts["classes"], **expected}
    (tmp_path / "classes.json").write_text(json.dumps(facts))
    source = registry.read_source("folder", str(tmp_path))
    report = check.check_source(source)
    assert report.problems == ()
    assert np.flatnonzero(report.pixels[:255]).size == len(facts["classes"])


@pytest.mark.parametrize(
    "usual, expected, remark",
    [
        # A stray value leaves 0 and 255 the two classes, and `check` names it.
        (
            np.where(LABEL == 3, 255, 0).astype(np.uint8),
            {"classes": ["background", "foreground"], "binary": True},
            None,
        ),
        (LABEL, 5, "only one mask holds 77 ({}, 16 pixels)"),
        (COLORS[LABEL], 5, "only one mask holds (77, 77, 77) ({}, 16 pixels)"),
    ],
)
def test_a_value_in_one_mask_alone_is_told(usual, expected, remark, tmp_path):
    for i in range(6):
        write_image(tmp_path / "images" / f"{i}.png", i)
        write_mask(tmp_path / "masks" / f"{i}.png", usual)
    stray = usual.copy()
    stray[:4, :4] = 77
    odd = tmp_path / "masks" / "4.png"
    write_mask(odd, stray)
    found = {path.stem: path for path in (tmp_path / "masks").iterdir()}
    proposal = survey.propose(tmp_path, found)
    told = proposal.warnings
    if isinstance(expected, int):
        assert len(proposal.facts["classes"]) == expected
    else:
        assert proposal.facts == expected
        (tmp_path / "classes.json").write_text(json.dumps(proposal.facts))
        (problem,) = check.check_source(
            registry.read_source("folder", str(tmp_path))
        ).problems
        assert f"{odd}: holds 77" in problem
    assert len(told) == (remark is not None)
    assert not told or told[0] == remark.format(odd)


def test_blends_at_borders_are_no_classes(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 16:] = 255
    mask[:, 14:17] = np.linspace(60, 200, 72).reshape(24, 3)
    write_mask(tmp_path / "0.png", mask)
    facts = survey.propose(tmp_path, {"0": tmp_path / "0.png"}).facts
    assert facts == {"classes": ["background", "foreground"], "binary": True}


def test_pictures_are_no_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    write_mask(tmp_path / "0.png", noise.repeat(8, 0).repeat(8, 1))
    write_mask(tmp_path / "1.png", LABEL)
    found = {str(i): tmp_path / f"{i}.png" for i in range(2)}
    many = np.arange(256, dtype=np.uint8).repeat(2)[:, None].repeat(2, 1) * [[1, 1]]
    assert len(survey.propose(tmp_path, found).facts["classes"]) < 255
    Image.fromarray(many.astype(np.uint16) * 3).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="write class indices"):
        survey.propose(tmp_path, found)
    (tmp_path / "0.png").write_text("x")
    with pytest.raises(ValueError, match="no classes can be proposed: .*0.png: not a"):
        survey.propose(tmp_path, {"0": tmp_path / "0.png"})


@pytest.mark.parametrize(
    "file, text, values, colors",
    [
        ("labels.txt", "0 sky\n1 road\n", {0: "sky", 1: "road"}, {}),
        (
            "_classes.csv",
            "Pixel Value, Class\n0, bg\n1, a b\n",
            {0: "bg", 1: "a b"},
            {},
        ),
        ("class_dict.csv", "name,r,g,b\nroad,1,2,3\n", {}, {(1, 2, 3): "road"}),
        ("label_colors.txt", "64 128 64\tAnimal\n", {}, {(64, 128, 64): "Animal"}),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\na b:1,2,3::\n",
            {},
            {(0, 0, 0): "background", (1, 2, 3): "a b"},
        ),
        (
            "dataset.json",
            '{"labels": {"bg": 0, "big leaf": "1", "all": [1, 2]}}',
            {0: "bg", 1: "big leaf"},
            {},
        ),
        ("dataset.json", '{"labels": {"0": "bg", "1": "x"}}', {0: "bg", 1: "x"}, {}),
        ("dataset.json", '{"labels": ["bg", "x"]}', {}, {}),
        ("dataset.json", "[", {}, {}),
    ],
)
def test_class_names_of_other_programs(file, text, values, colors, tmp_path):
    (tmp_path / file).write_text(text)
    known = names.find(tmp_path)
    assert (known.values, known.colors) == (values, colors)


@pytest.mark.parametrize(
    "listed, values, expected",
    [
        ("crack", [0, 1], ["background", "crack"]),
        ("crack", [0, 255], ["background", "crack"]),
        ("cat\ndog", [0, 1, 2], ["background", "cat", "dog"]),
        ("cat\ndog", [0, 1], ["cat", "dog"]),
        ("cat\ndog", [0, 255], ["cat", "dog"]),
        ("cat\ndog\ncow", [0, 1], ["cat", "dog", "cow"]),
        ("bg\ncat", [0, 1, 2], None),
        ("cat\ndog\ncow", [0, 1, 2, 3, 4], None),
        ("road\nsky", [1, 2, 255], ["road", "sky"]),
        ("background\nroad\nsky", [1, 2], ["road", "sky"]),
        ("road\nsky\ncar", [1, 2], None),
        ("grade 1\ngrade 2\ngrade 3", [0, 1, 2], ["grade 1", "grade 2", "grade 3"]),
        ("Sky\nRoad\nVoid", [0, 1, 2], ["Sky", "Road"]),
        ("void\nSky\nRoad", [0, 1, 2], ["Sky", "Road"]),
        ("0 sky\n1 void\n2 road", [0, 1, 2], ["sky", "road"]),
    ],
)
def test_names_alone_are_given_to_values_they_fit(listed, values, expected, tmp_path):
    (tmp_path / "classes.txt").write_text(listed)
    bands = np.arange(SIZE[0]) * len(values) // SIZE[0]
    mask = np.array(values, np.uint8)[bands][:, None].repeat(SIZE[1], 1)
    for i in "01":
        write_image(tmp_path / "images" / f"{i}.png", int(i))
        write_mask(tmp_path / "masks" / f"{i}.png", mask)
    found = {i: tmp_path / "masks" / f"{i}.png" for i in "01"}
    proposal = survey.propose(tmp_path, found)
    names_of = proposal.facts["classes"]
    if expected is None:
        assert proposal.named_in is None
        (warning,) = [line for line in proposal.remarks if line.startswith("warning")]
        assert "so it is not used; name the classes in classes.json" in warning
        assert {*names_of} <= {"background", "foreground"} | {
            f"class_{value}" for value in values
        }
        return
    assert names_of == expected
    assert not any(line.startswith("warning") for line in proposal.remarks)
    assert proposal.named_in == tmp_path / "classes.txt"
    assert names.find(tmp_path).agrees(expected)
    (tmp_path / "classes.json").write_text(json.dumps(proposal.facts))
    source = registry.read_source("folder", str(tmp_path))
    assert check.check_source(source).problems == ()


def test_names_alone_are_those_of_a_palettes_indices(tmp_path):
    (tmp_path / "classes.txt").write_text("leaf\nstem\nroot\n")
    write_mask(tmp_path / "0.png", LABEL, COLORS)
    facts = survey.propose(tmp_path, {"0": tmp_path / "0.png"}).facts
    assert facts["classes"] == ["background", "leaf", "stem", "root"]
    assert facts["palette"] == COLORS.tolist()


def test_names_of_a_published_palette(tmp_path):
    colors = np.array([(0, 0, 0), *camvid.CLASSES.values()], np.uint8)[:4]
    write_mask(tmp_path / "0.png", colors[LABEL])
    facts = survey.propose(tmp_path, {"0": tmp_path / "0.png"}).facts
    assert facts["classes"] == ["sky", "building", "pole"]
    assert facts["void"] == [[0, 0, 0]]


def test_names_without_colors_are_not_given_to_colors(tmp_path):
    write_mask(tmp_path / "0.png", COLORS[LABEL])
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    proposal = survey.propose(tmp_path, {"0": tmp_path / "0.png"})
    assert not {"sky", "road"} & {*proposal.facts["classes"]}
    assert proposal.named_in is None
    *_, warning = [line for line in proposal.remarks if line.startswith("warning")]
    assert warning.startswith(f"warning: {tmp_path / 'classes.txt'} says no colors")
    assert not proposal.warnings


def _propose(tmp_path, labels, listed, palette=None):
    """Proposes classes of a folder with nnU-Net's list of names."""
    if listed is not None:
        text = json.dumps({"labels": listed})
        (tmp_path / "dataset.json").write_text(text)
    paths = [tmp_path / f"{i}.png" for i in range(len(labels))]
    for path, label in zip(paths, labels, strict=True):
        write_mask(path, label.astype(np.uint8), palette)
    return survey.propose(tmp_path, dict(enumerate(paths)))


@pytest.mark.parametrize(
    "listed, expected, used",
    [
        (
            {"background": 0, "liver": 1, "tumor": 2},
            ["background", "liver", "tumor"],
            True,
        ),
        ({"background": 0, "all": [1, 2], "core": 2}, ["background", "class_1"], False),
        ({"sky": 0, "road": 1}, ["sky", "road"], True),
        ({"road": 1}, ["background", "road"], True),
        (None, ["background", "foreground"], False),
    ],
)
def test_masks_of_0_and_1_have_the_names_of_these_values(
    listed, expected, used, tmp_path
):
    proposal = _propose(tmp_path, [LABEL % 2], listed)
    assert proposal.facts["classes"] == expected
    assert proposal.named_in == (tmp_path / "dataset.json" if used else None)


@pytest.mark.parametrize(
    "listed, expected",
    [
        ({"background": 0, "liver": 1, "tumor": 2}, ["background", "foreground"]),
        ({"background": 0, "core": 2}, ["background", "foreground"]),
        ({"sky": 0, "road": 1}, ["sky", "road"]),
        ({"sky": 0, "road": 255}, ["sky", "road"]),
    ],
)
def test_names_of_binary_masks(listed, expected, tmp_path):
    assert _propose(tmp_path, [LABEL % 2 * 255], listed).facts["classes"] == expected


def test_names_and_void_of_a_palette_are_those_of_its_indices(tmp_path):
    palette = COLORS[[1, 3, 0, 2]]
    listed = {"background": 0, "leaf": 1, "stem": 2, "ignore": 3}
    proposal = _propose(tmp_path, [LABEL], listed, palette)
    assert proposal.facts == {
        "classes": ["background", "leaf", "stem"],
        "palette": palette[:3].tolist(),
        "void": [palette[3].tolist()],
    }
    assert proposal.named_in == tmp_path / "dataset.json"
    # Without one of the indices, which has no color then.
    label = np.where(LABEL == 1, 0, LABEL)
    facts = _propose(tmp_path, [label], listed, palette).facts
    assert facts["classes"] == ["background", "stem"]
    # Palettes that disagree say nothing about indices.
    write_mask(tmp_path / "a.png", LABEL, palette)
    write_mask(tmp_path / "b.png", LABEL, COLORS)
    found = {key: tmp_path / f"{key}.png" for key in "ab"}
    proposal = survey.propose(tmp_path, found)
    assert len(proposal.facts["classes"]) == 4 and proposal.named_in is None


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("rows", [2, 12])
def test_few_pixels_of_the_next_value_are_told(rows, least, tmp_path):
    usual = LABEL % 2 + least
    stray = usual.copy()
    stray[:rows, :8] = least + 2
    proposal = _propose(tmp_path, [usual] * 5 + [stray], None)
    assert len(proposal.facts["classes"]) == 3
    told = f"only one mask holds {least + 2} ({tmp_path / '5.png'}, 16 pixels)"
    assert proposal.warnings == ((told,) if rows == 2 else ())
