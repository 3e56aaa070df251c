"""What the pixels of masks mean, in every way in which people store them."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from launch import check_data, prepare_data
from mpmc_jax.data import check, decode, masks, registry
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.masks import MaskFormat, decode_mask, read_mask
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.evaluation.predict import Band
from mpmc_jax.evaluation.prediction_files import paths, write_prediction
from tests.support.data_sets import make_folder

LABEL = np.resize(np.array([0, 1, 2, 1, 0], np.uint8), (20, 24))
RED_GREEN = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
COLORS = MaskFormat({color: i for i, color in enumerate(RED_GREEN)}, declared_in="x")


def encoded(picture, kind="PNG", **settings):
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def image(array, mode=None):
    picture = Image.fromarray(np.asarray(array))
    return picture if mode is None else picture.convert(mode)


def paletted(index, palette):
    picture = Image.fromarray(index)
    picture.putpalette(np.array(palette, np.uint8).tobytes())
    return picture


def tiff(array, **settings):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **settings)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def gray_png(values, bits):
    """A gray PNG of 1, 2 or 4 bits, which Pillow does not write."""
    rows = []
    for row in values:
        whole = np.resize(row, -(-len(row) * bits // 8) * 8 // bits)
        planes = (whole[:, None] >> np.arange(bits)[::-1]) & 1
        rows.append(b"\0" + np.packbits(planes.astype(np.uint8).ravel()).tobytes())
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", size), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        check_sum = struct.pack(">I", zlib.crc32(name + data))
        content += struct.pack(">I", len(data)) + name + data + check_sum
    return content


WITH_ALPHA = np.dstack([LABEL, np.full_like(LABEL, 255)])
BY_VALUE = {
    "gray": encoded(image(LABEL)),
    "palette of any colors": encoded(paletted(LABEL, [(9, 9, 9)] * 3)),
    "gray with alpha": encoded(image(WITH_ALPHA)),
    "equal channels": encoded(image(LABEL, "RGB")),
    "equal channels with alpha": encoded(image(LABEL, "RGBA")),
    "2 bits": gray_png(LABEL, 2),
    "4 bits": gray_png(LABEL, 4),
    "16 bits": encoded(image(LABEL.astype(np.uint16))),
    "lossless WebP": encoded(image(LABEL, "RGB"), "WEBP", lossless=True),
    "BMP": encoded(image(LABEL), "BMP"),
    **{
        f"TIFF {name}": tiff(LABEL.astype(name))
        for name in ("int8", "int16", "uint32", "int64", "float32", "float64")
    },
    **{
        f"npy {name}": npy(LABEL.astype(name))
        for name in ("uint8", "int64", "float16", ">i2")
    },
}


@pytest.mark.parametrize("kind", BY_VALUE)
def test_values_are_classes_however_they_are_stored(kind):
    np.testing.assert_array_equal(decode_mask(BY_VALUE[kind]), LABEL)


def test_one_bit_is_two_classes():
    np.testing.assert_array_equal(decode_mask(gray_png(LABEL % 2, 1)), LABEL % 2)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float32"])
@pytest.mark.parametrize("write", [tiff, npy])
def test_minus_one_is_void(dtype, write):
    values = LABEL.astype(dtype)
    values[0] = -1
    expected = LABEL.copy()
    expected[0] = 255
    np.testing.assert_array_equal(decode_mask(write(values)), expected)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("int8", -128),
        ("int16", -32768),
        ("int16", -256),  # A multiple of 256 wraps to class 0, one more to class 1.
        ("int16", 257),
        ("uint16", 65535),
        ("int32", -(2**31)),
        ("uint32", 2**32 - 1),  # As signed it is -1.
        ("uint32", 65536),
        ("int64", 2**32 + 1),
        ("float32", 0.5),
        ("float64", -9999.0),
        ("float32", np.nan),
    ],
)
@pytest.mark.parametrize("write", [tiff, npy])
def test_a_value_that_is_nothing_is_named_as_written(dtype, value, write):
    values = LABEL.astype(dtype)
    values[3, 5] = value
    written = values[3, 5].item()
    with pytest.raises(UnreadableImage) as error:
        decode_mask(write(values))
    assert f"values {written} are neither a class nor void" in str(error.value)
    if written % 1 == 0:
        declared = MaskFormat(void=(int(written),))
        assert read_mask(write(values), declared).label_hw[3, 5] == 255


@pytest.mark.parametrize(
    "content",
    [
        encoded(image(LABEL * 0), "JPEG"),
        encoded(image(LABEL * 0, "RGB"), "WEBP", quality=80),
        encoded(image(LABEL * 0), "TIFF", compression="jpeg"),
    ],
    ids=["JPEG", "WebP", "TIFF"],
)
def test_lossy_masks_are_refused_whatever_their_values(content):
    with pytest.raises(UnreadableImage, match="lossy .* store masks as PNG"):
        decode_mask(content)


def test_transparency_that_tells_pixels_apart_is_refused():
    alpha = (LABEL * 100).astype(np.uint8)
    hidden = np.dstack([np.zeros((20, 24, 3), np.uint8), alpha])
    for content in (encoded(image(hidden)), encoded(image(hidden[..., 2:]))):
        with pytest.raises(UnreadableImage, match="without an alpha channel"):
            decode_mask(content)
    # Each color has one transparency: nothing is hidden.
    shown = np.dstack([np.array(RED_GREEN, np.uint8)[LABEL], alpha])
    found = read_mask(encoded(image(shown)), COLORS)
    np.testing.assert_array_equal(found.label_hw, LABEL)


def test_inverted_and_reduced_values_are_refused():
    for array in (LABEL, LABEL > 0):
        with pytest.raises(UnreadableImage, match="0 is white"):
            decode_mask(tiff(array, photometric="miniswhite"))
    found = decode_mask(tiff(LABEL > 0, photometric="minisblack"))
    np.testing.assert_array_equal(found, LABEL > 0)
    content = bytearray(encoded(image(WITH_ALPHA)))
    content[24] = 16
    with pytest.raises(UnreadableImage, match="16 bits"):
        decode_mask(bytes(content))


@pytest.mark.parametrize(
    ("picture", "convention"),
    [
        (paletted(2 - LABEL, RED_GREEN[::-1]), "colors"),
        (image(np.array(RED_GREEN, np.uint8)[LABEL]), "colors"),
        (paletted(LABEL, RED_GREEN), ""),
        (image(LABEL), "values"),
        (paletted(LABEL, [(i,) * 3 for i in range(256)]), "values"),
        (image(LABEL, "RGB"), "values"),
    ],
)
def test_where_colors_are_named(picture, convention):
    found = read_mask(encoded(picture), COLORS)
    np.testing.assert_array_equal(found.label_hw, LABEL)
    assert found.convention == convention


def test_named_grays_are_colors():
    form = MaskFormat({(0, 0, 0): 0, (255, 255, 255): 1}, declared_in="x")
    shown = (LABEL % 2 * 255).astype(np.uint8)
    for picture in (image(shown), image(shown, "RGB"), image(shown, "1")):
        found = read_mask(encoded(picture), form)
        np.testing.assert_array_equal(found.label_hw, LABEL % 2)
    assert read_mask(encoded(image(shown)), form).convention == "colors"


def test_an_unknown_color_of_a_palette_is_named():
    picture = paletted(LABEL, [(0, 0, 0), (254, 0, 0), (0, 255, 0)])
    with pytest.raises(UnreadableImage, match=r"\(254, 0, 0\).* from x if the ind"):
        read_mask(encoded(picture), COLORS)
    # As in VOC: 255 in a color of its own is void.
    palette = RED_GREEN + [(0, 0, 0)] * 252 + [(224, 224, 192)]
    label = LABEL.copy()
    label[0] = 255
    found = read_mask(encoded(paletted(label, palette)), COLORS)
    np.testing.assert_array_equal(found.label_hw, label)


def test_binary_masks():
    form = MaskFormat(binary=True, declared_in="x")
    two = LABEL % 2
    shown = (two * 255).astype(np.uint8)
    pictures = (
        image(shown),
        image(shown, "1"),
        image(shown, "RGB"),
        paletted(two, [(0, 0, 0), (255, 255, 255)]),
        paletted(1 - two, [(255, 255, 255), (0, 0, 0)]),
        paletted(shown, [(i, 0, 0) for i in range(256)]),
    )
    for picture in pictures:
        found = read_mask(encoded(picture), form)
        np.testing.assert_array_equal(found.label_hw, two)
    with pytest.raises(UnreadableImage, match="holds 1; with"):
        read_mask(encoded(image(two)), form)
    large = np.zeros((20, 20), np.uint8)
    large[3, 4] = 77
    with pytest.raises(
        UnreadableImage,
        match=r"^holds 77; if this pixel, in row 3 and column 4 \(from 0\), is a slip, "
        'repaint it; otherwise: with "binary" masks hold only 0 and 255',
    ):
        read_mask(encoded(image(large)), form)


def test_void_values_shift_the_classes():
    form = MaskFormat(void=(0,))
    values = np.array([[0, 1, 2, 3, 255]], np.uint8)
    found = read_mask(encoded(image(values)), form)
    assert found.label_hw.tolist() == [[255, 0, 1, 2, 255]]
    assert [form.value(label) for label in (0, 1, 2)] == [1, 2, 3]
    assert not found.is_plain


@pytest.fixture
def folder(tmp_path):
    """Twelve masks of 0, 1, 2 and 255, see `make_folder`."""
    return make_folder(tmp_path / "src")


def write_all(folder, convert):
    for path in sorted((folder / "masks").iterdir()):
        label = np.asarray(Image.open(path))
        content = convert(int(path.stem[2:]), label)
        path.write_bytes(content)


def declare(folder, **facts):
    content = {"classes": ["a", "b", "c"], **facts}
    (folder / "classes.json").write_text(json.dumps(content))


def problems(folder):
    return check.check_source(registry.read_source("folder", str(folder))).problems


def prepared(folder, data_dir):
    named = ["--dataset=folder", f"--source={folder}"]
    prepare_data.main([*named, f"--data_dir={data_dir}"])
    check_data.main(["--dataset=folder", f"--data_dir={data_dir}"])
    info = open_dataset(str(data_dir), "folder")
    return {
        key: decode.record_label(record["mask"])
        for split, keys in info.ids.items()
        for key, record in zip(keys, info.records(split), strict=True)
    }


def labels(folder):
    return {
        path.stem: np.asarray(Image.open(path)).copy()
        for path in (folder / "masks").iterdir()
    }


def test_reordered_palettes_are_prepared_as_they_look(folder, tmp_path):
    expected = labels(folder)
    void = (9, 9, 90)
    order = np.array([2, 3, 0, 1])
    shown = np.array([*RED_GREEN, void], np.uint8)

    def convert(number, label):
        del number
        index = order[np.minimum(label, 3)].astype(np.uint8)
        return encoded(paletted(index, shown[np.argsort(order)]))

    write_all(folder, convert)
    declare(folder, palette=RED_GREEN, void=[void])
    found = prepared(folder, tmp_path / "data")
    for key, label in expected.items():
        np.testing.assert_array_equal(found[key], label)


def test_our_own_predictions_are_masks(folder):
    declare(folder, palette=RED_GREEN)
    for path in (folder / "masks").iterdir():
        label = np.asarray(Image.open(path)) % 3
        stem = path.with_suffix("")
        targets = paths(stem, ["index"])
        band = Band(0, label, None)
        write_prediction(targets, [band], np.zeros((20, 24, 1)), RED_GREEN)
        targets["index"].replace(path)
    assert problems(folder) == ()


@pytest.mark.parametrize("write", [npy, tiff])
def test_values_beyond_the_classes_are_told_in_every_format(folder, write):
    for path in (folder / "masks").iterdir():
        path.unlink()
        path.with_suffix(".tif" if write is tiff else ".npy").write_bytes(
            write(np.where(LABEL == 2, 7, LABEL).astype(np.uint32))
        )
    for problem in problems(folder):
        assert "values 7 are not below the class count 3; store class" in problem
    declare(folder, void=[0])
    for problem in problems(folder):
        assert problem.endswith("the classes have the values 1, 2, 3")


def test_void_of_0_is_told_with_its_mend_and_understood(folder, tmp_path, capsys):
    expected = labels(folder)
    write_all(
        folder,
        lambda number, label: encoded(image(np.where(label == 255, 0, label + 1))),
    )
    for problem in problems(folder):
        assert "If 0 is void" in problem and '"void": [0]' in problem
    declare(folder, void=[0])
    found = prepared(folder, tmp_path / "data")
    for key, label in expected.items():
        np.testing.assert_array_equal(found[key], label)
    # The name of void among the classes: each would be the next one's.
    declare(folder, classes=["void", "a", "b", "c"], void=[0])
    report = check.check_source(registry.read_source("folder", str(folder)))
    assert report.problems == ()  # It may be right: training refuses absent classes.
    (warning,) = report.warnings
    assert "no mask holds 4, which is 'c'" in warning
    declare(folder, classes=["a", "b"], void=[0])
    assert all("values 3 are not below" in problem for problem in problems(folder))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"classes": ["water"]}, '["background", "water"]}, with "binary": true'),
        ({"classes": [f"c{i}" for i in range(300)]}, "300 classes, and 255 is the"),
        ({"classes": [f"c{i}" for i in range(255)], "void": [0]}, "254 is the most"),
        ({"classes": ["a", "b\x1b[31m"]}, r"'b\x1b[31m'"),
        ({"classes": ["a", " "]}, "names that are empty"),
        ({"classes": ["a b", "a_b"]}, "both 'a_b' in TensorBoard"),
        ({"void": [[1, 2, 3]]}, 'there is no "palette"'),
        ({"void": 0}, '"void" is not a list'),
        ({"void": [True]}, '"void" is not a list of values'),
        ({"void": [0, 0]}, '"void" repeats 0'),
        ({"classes": ["a", "b"], "binary": True, "void": [0]}, "no palette or void"),
        ({"nodata": "none"}, '"nodata" is a list of numbers and "nan"'),
        ({"nodata": [True]}, '"nodata" is a list of numbers and "nan"'),
    ],
)
def test_what_classes_json_may_not_say_is_told_before_a_mask_is_read(
    folder, facts, message, monkeypatch
):
    declare(folder, **facts)
    monkeypatch.setattr(masks, "read_mask", None)
    (problem,) = problems(folder)
    assert problem.startswith(f"{folder / 'classes.json'}: ")
    assert message in problem


def test_settings_that_change_what_is_prepared_change_the_fingerprint(folder):
    two = ["a", "b"]
    several = (
        {},
        {"void": [0]},
        {"void": [255]},
        {"palette": RED_GREEN},
        {"nodata": [-9999]},
        {"nodata": [-9999, "nan"]},
        {"classes": two},
        {"classes": two, "binary": True},
    )
    found = set()
    for facts in several:
        declare(folder, **facts)
        found.add(registry.read_source("folder", str(folder)).fingerprint())
    assert len(found) == len(several)
    declare(folder)
    assert registry.read_source("folder", str(folder)).fingerprint() in found
