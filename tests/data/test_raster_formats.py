"""Images of more than 8 bits, or of any number of channels."""

import concurrent.futures
import io
import json
import os
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from launch import check_data, prepare_data
from mpmc_jax.data import build, decode
from mpmc_jax.data import raster_formats as deep
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.geometry import registry as geometries
from mpmc_jax.data.geometry.cropping import CropConfig, fill_color, to_bytes
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.models.registry import encoder_normalization
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for, write_image


def plain(channels, dtype):
    """A format whose figures do not matter."""
    return PixelFormat(channels, (0.0,), (1.0,), dtype)


def npy(array, **settings):
    stream = io.BytesIO()
    np.save(stream, array, **settings)
    return stream.getvalue()


def tiff(array, **settings):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **settings)
    return stream.getvalue()


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def values(shape, dtype):
    unit = np.random.default_rng(0).random(shape)
    top = {"u1": 255, "u2": 65535}.get(np.dtype(dtype).str[1:], 1)
    return (unit * top).astype(dtype)


FOUR, GRAY16 = values((6, 9, 4), "uint16"), values((6, 9), "uint16")
BANDS = values((6, 9, 4), "uint8")
FILES = {
    "npy": (npy(FOUR), FOUR),
    "npy, columns first": (npy(np.asfortranarray(FOUR)), FOUR),
    "npy, big-endian": (npy(FOUR.astype(">u2")), FOUR),
    "npy, gray": (npy(GRAY16), GRAY16[..., None]),
    "npy, floats": (npy(values((6, 9, 2), "float32")), values((6, 9, 2), "float32")),
    "npy, RGB": (npy(values((6, 9, 3), "uint8")), values((6, 9, 3), "uint8")),
    "png, gray": (png(GRAY16), GRAY16[..., None]),
    "tiff, gray": (tiff(GRAY16), GRAY16[..., None]),
    "tiff, interleaved": (
        tiff(FOUR, photometric="minisblack", planarconfig="contig"),
        FOUR,
    ),
    "tiff, planes": (
        tiff(
            np.moveaxis(FOUR, -1, 0), photometric="minisblack", planarconfig="separate"
        ),
        FOUR,
    ),
    "tiff, pages": (tiff(np.moveaxis(FOUR, -1, 0), photometric="minisblack"), FOUR),
    "tiff, rows as pages": (tiff(FOUR, photometric="minisblack"), FOUR),
    "tiff, deflate": (tiff(GRAY16, compression="zlib"), GRAY16[..., None]),
    "tiff, deep color": (tiff(FOUR[..., :3], photometric="rgb"), FOUR[..., :3]),
    "tiff, color and a band": (
        tiff(BANDS, photometric="rgb", extrasamples=["unspecified"]),
        BANDS,
    ),
    "tiff, floats": (tiff(values((6, 9), "float32")), values((6, 9, 1), "float32")),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_read_exactly(kind):
    content, expected = FILES[kind]
    header = decode.read_header(content)
    assert header == deep.Header((6, 9), expected.shape[-1], expected.dtype.name)
    pixels = plain(expected.shape[-1], expected.dtype.name)
    found = decode.decode_array(content, pixels)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and found.dtype.isnative
    again = decode.encode_record(content, pixels, unpacked=False)
    np.testing.assert_array_equal(decode.decode_array(again, pixels), expected)


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_headers_are_parsed_one_at_a_time(monkeypatch):
    parse, inside, most = np.lib.format.read_array_header_1_0, [], []

    def slow(stream):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return parse(stream)

    monkeypatch.setitem(deep._HEADERS, (1, 0), slow)
    content = npy(np.zeros((4, 5), np.float32))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        read = list(pool.map(deep._read_npy, [content] * 12))
    assert max(most) == 1 and len(most) == len(read) == 12


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"
    content = npy(np.array([[Malice(str(trap))]], object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="Python objects .* never loaded"):
        decode.decode_array(content, plain(1, "float32"))
    assert not trap.exists()
    np.load(io.BytesIO(content), allow_pickle=True)  # The trap works.
    assert trap.exists()


def huge(shape):
    """The header of an array that nobody could hold."""
    stream = io.BytesIO()
    header = {"descr": "<u2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(100)


@pytest.mark.parametrize(
    ("content", "pixels", "message"),
    [
        (huge((10**6, 10**6)), plain(1, "uint16"), "limit .* cut the image into tiles"),
        (npy(FOUR)[:-5], plain(4, "uint16"), "truncated or damaged"),
        (npy(FOUR)[:9], plain(4, "uint16"), "not a .npy file of an image"),
        (npy(FOUR), plain(3, "uint16"), "4 channels of uint16, .* 3 of uint16"),
        (npy(FOUR), RGB, "4 channels of uint16, .* 3 of uint8"),
        (png(values((6, 9, 3), "uint8")), plain(4, "uint16"), "3 channels of uint8"),
        (tiff(FOUR[..., :3], photometric="rgb"), RGB, "TIFF with more .* bits"),
        (tiff(np.stack([BANDS[..., 0]] * 2)), GRAY, "TIFF with more .* pages"),
        (npy(FOUR.astype(float)), plain(4, "float32"), "values are float64; convert"),
        (npy(FOUR[None]), plain(4, "uint16"), "is not that of an image"),
        (npy(np.zeros((3, 9, 99), "u2")), plain(3, "uint16"), "channels.* come last"),
        (npy(np.full((2, 2), np.nan, "f4")), plain(1, "float32"), "4 values .* NaN"),
        (tiff(FOUR[..., 0])[:60], plain(1, "uint16"), "TIFF|decoded"),
        (b"", plain(2, "uint16"), "an empty file"),
    ],
)
def test_what_is_no_such_image_is_refused(content, pixels, message):
    with pytest.raises(UnreadableImage, match=message):
        decode.decode_array(content, pixels)


def test_deep_color_is_not_silently_halved():
    # By hand, since Pillow writes no such PNG either.
    content = bytearray(png(values((6, 9, 3), "uint8")))
    content[24:26] = b"\x10\x02"
    with pytest.raises(UnreadableImage, match="16 bits per color"):
        decode.decode_array(bytes(content), RGB)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("name", ["unimatch", "u2pl"])
def test_deep_images_are_cut_where_bytes_are(name, dtype):
    rng = np.random.default_rng(7)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    rgb = coarse.resize((70, 50), Image.Resampling.BICUBIC)
    scale = {"uint8": 1, "uint16": 257, "float32": 1 / 255}[dtype]
    channels = np.asarray(rgb)[..., [0, 1, 2, 1]]
    deep = (channels.astype(np.float64) * scale).astype(dtype)
    top = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}[dtype]
    pixels = PixelFormat(4, (0.25,), (1.0,), dtype, high=(top,))
    config = CropConfig(40, 0.4, 1.6, fill="mean")
    for _ in range(20):
        cut = geometries.GEOMETRIES[name].draw(rng, (50, 70), config)
        found = cut.image(deep, config, pixels)
        assert found.dtype == dtype and found.shape == (40, 40, 4)
        expected = cut.image(rgb, config, RGB).astype(np.float64)
        top_, left, bottom, right = cut.extent()
        difference = found[..., :3] / scale - expected
        real = difference[top_:bottom, left:right]
        # Pillow rounds bytes to a level, and after each axis.
        assert np.abs(real).max() < 2.01
        padding = np.ones((40, 40), bool)
        padding[top_:bottom, left:right] = False
        wanted = np.array(63 / 255 * top).astype(dtype)
        np.testing.assert_array_equal(found[padding], wanted)
        np.testing.assert_array_equal(found[..., 1], found[..., 3])


def test_deep_images_become_bytes_by_truncation():
    pixels = PixelFormat(2, (0.0,), (1.0,), "float32", low=(0.0, -2.0), high=(1.0, 2.0))
    values = np.array([[[0.0, -2.0], [0.5, 0.0], [1.0, 2.0], [1.5, -9.0]]], np.float32)
    expected = [[[0, 0], [127, 127], [255, 255], [255, 0]]]
    np.testing.assert_array_equal(to_bytes(values, pixels), expected)
    published = np.random.default_rng(8).random((9, 9, 1)).astype(np.float32)
    plain = PixelFormat(1, (0.0,), (1.0,), "float32", high=(1.0,))
    np.testing.assert_array_equal(
        to_bytes(published, plain), (published * 255).astype(np.uint8)
    )
    assert fill_color("black", pixels).tolist() == [0.0, -2.0]


@pytest.fixture
def folder(tmp_path):
    """Twelve labeled images of four channels of 16 bits, and four without masks."""
    rng = np.random.default_rng(1)
    root = tmp_path / "src"
    for i in range(16):
        image = rng.integers(100, 5000, (40, 48, 4), dtype=np.uint16)
        image[..., 2] = 7
        where = root / ("images" if i < 12 else "unlabeled") / f"im{i:02d}.npy"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(npy(image))
        if i < 12:
            label = rng.choice(np.array([0, 255], np.uint8), (40, 48))
            write_image(root / "masks" / f"im{i:02d}.png", label)
    facts = {"classes": ["ground", "house"], "binary": True}
    (root / "classes.json").write_text(json.dumps(facts))
    return root


def prepare(root, data_dir):
    prepare_data.main(
        ["--dataset=folder", f"--source={root}", f"--data_dir={data_dir}"]
    )
    return open_dataset(str(data_dir), "folder")


def test_a_folder_of_deep_images(folder, tmp_path, capsys):
    check_data.main(["--dataset=folder", f"--source={folder}"])
    assert "2 classes, 4 channels of uint16: ground, house" in capsys.readouterr().out
    info = prepare(folder, tmp_path / "data")
    check_data.main(["--dataset=folder", f"--data_dir={tmp_path / 'data'}"])
    paths = {path.stem: path for path in folder.rglob("*.npy")}
    trained = np.stack([np.load(paths[key]) for key in info.ids["train"]])
    low, high = (f(trained, axis=(0, 1, 2)).astype(float) for f in (np.min, np.max))
    high[2] += 1  # A channel of one value.
    unit = (trained - low) / (high - low)
    pixels = info.facts.pixels
    assert (pixels.channels, pixels.dtype) == (4, "uint16")
    np.testing.assert_allclose(pixels.low, low)
    np.testing.assert_allclose(pixels.high, high)
    np.testing.assert_allclose(pixels.mean, unit.mean((0, 1, 2)), rtol=1e-12)
    std = unit.std((0, 1, 2))
    std[2] = 1
    np.testing.assert_allclose(pixels.std, std, rtol=1e-12)
    config = config_for(tmp_path / "data", "folder", split="3")
    source = build.build_eval(config)
    for i, key in enumerate(source.ids):
        assert source.size(i) == (40, 48)
        np.testing.assert_array_equal(source[i].image, np.load(paths[key]))
        mask = np.asarray(Image.open(folder / "masks" / f"{key}.png"))
        np.testing.assert_array_equal(source[i].label, mask == 255)
    iterator = build.build_train(config, Streams(partner="same")).iterator()
    batch = next(iterator)
    iterator.close()
    assert batch.labeled.image.dtype == np.uint16
    assert batch.labeled.image.shape == (4, 32, 32, 4)
    assert batch.unlabeled.image.dtype == batch.partner.image.dtype == np.uint8


def test_images_that_disagree_are_named(folder):
    (folder / "images" / "im00.npy").write_bytes(npy(values((40, 48, 3), "uint16")))
    message = "im00.npy: 3 channels of uint16, but the data set has 4 of uint16"
    with pytest.raises(SystemExit, match=message):
        check_data.main(["--dataset=folder", f"--source={folder}"])


def test_masks_of_0_and_255_are_asked_about(folder):
    (folder / "classes.json").write_text(json.dumps({"classes": ["ground", "house"]}))
    with pytest.raises(SystemExit, match="if it is 'house', write \"binary\": true"):
        check_data.main(["--dataset=folder", f"--source={folder}"])
    facts = {"classes": ["a", "b", "c"], "binary": True}
    (folder / "classes.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match='"binary" masks have two classes'):
        check_data.main(["--dataset=folder", f"--source={folder}"])


def test_binary_masks_of_other_values_are_refused(folder):
    write_image(folder / "masks" / "im05.png", np.full((40, 48), 254, np.uint8))
    with pytest.raises(SystemExit, match='im05.png: holds 254; with "binary"'):
        check_data.main(["--dataset=folder", f"--source={folder}"])


def test_figures_of_the_normalization():
    own = PixelFormat(3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert build.normalization("auto", own, "imagenet") == RGB
    half = build.normalization("auto", own, encoder_normalization("dpt", "vit_s16"))
    assert half.mean == half.std == (0.5, 0.5, 0.5)
    assert encoder_normalization("dpt", "dinov2_s14") == "imagenet"
    assert encoder_normalization("unet", "vit_s16") == "imagenet"
    assert build.normalization("dataset", own, "half") == own
    none = build.normalization("none", own, "imagenet")
    assert (none.mean, none.std) == ((0.0,) * 3, (1.0,) * 3)
    four = PixelFormat(4, (0.1,), (0.4,), "uint16")
    assert build.normalization("auto", four, "half") == four
    with pytest.raises(ValueError, match="needs 3 channels, and the images have 4"):
        build.normalization("imagenet", four, "imagenet")
    with pytest.raises(ValueError, match="valid: auto, dataset, imagenet, half, none"):
        build.normalization("z-score", own, "imagenet")
