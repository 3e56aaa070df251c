"""What the pixels of images mean: turned, missing, or too many to unpack."""

import dataclasses
import gzip
import io
import json
import resource
import subprocess
import sys
import zlib

import h5py
import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mpmc_jax.data import build, check, decode, raster_formats, registry
from mpmc_jax.data.builders import volumes
from mpmc_jax.data.masks import decode_mask
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for, make_folder

ORIENTATIONS = range(1, 9)


def scene(rows=20, columns=24):
    """An image whose four corners differ."""
    row, column = np.mgrid[:rows, :columns]
    return np.dstack([row * 12, column * 10, row + column]).astype(np.uint8)


def with_exif(array, orientation, kind="PNG", **settings):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(stream, kind, exif=exif, **settings)
    return stream.getvalue()


def exif_after_pixels(content):
    """A PNG with its eXIf chunk moved to the end."""
    at = content.index(b"eXIf") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    chunk, rest = content[at : at + length], content[:at] + content[at + length :]
    return rest[:-12] + chunk + rest[-12:]


def shown(array, orientation):
    """As Pillow turns, which its own tests compare with cameras' files."""
    stored = Image.open(io.BytesIO(with_exif(array, orientation)))
    return np.asarray(ImageOps.exif_transpose(stored))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_and_masks_are_turned_as_a_viewer_turns_them(orientation):
    array = scene()
    expected = shown(array, orientation)
    files = [
        with_exif(array, orientation),
        exif_after_pixels(with_exif(array, 6)).replace(
            b"\x01\x12\0\x03\0\0\0\x01\0\x06",
            b"\x01\x12\0\x03\0\0\0\x01" + orientation.to_bytes(2, "big"),
        ),
        with_exif(array, orientation, "WEBP", lossless=True),
        with_exif(array, orientation, "TIFF"),
    ]
    for content in files:
        np.testing.assert_array_equal(decode.decode_array(content, RGB), expected)
        assert decode.read_header(content).size == expected.shape[:2]
    jpeg = with_exif(array, orientation, "JPEG", quality=98)
    found = decode.decode_array(jpeg, RGB).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 12
    assert decode.read_header(jpeg).size == expected.shape[:2]
    mask = with_exif(array[..., 0], orientation)
    np.testing.assert_array_equal(decode_mask(mask), expected[..., 0])
    unpacked = decode.encode_record(files[0], RGB, unpacked=True)
    np.testing.assert_array_equal(decode.decode_array(unpacked, RGB), expected)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_deep_tiffs_are_turned_alike(orientation):
    array = scene().astype(np.uint16) * 200
    stream = io.BytesIO()
    tag = (274, 3, 1, orientation, False)
    tifffile.imwrite(stream, array, photometric="rgb", extratags=[tag])
    pixels = PixelFormat(3, (0.0,), (1.0,), "uint16")
    expected = shown(scene(), orientation).astype(np.uint16) * 200
    content = stream.getvalue()
    np.testing.assert_array_equal(decode.decode_array(content, pixels), expected)
    assert decode.read_header(content).size == expected.shape[:2]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_header_of_a_turned_tiff_with_other_metadata_is_right(orientation):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
    tags = [(274, 3, 1, orientation, False), (700, 1, len(xmp), xmp, False)]
    stream = io.BytesIO()
    tifffile.imwrite(stream, scene(), photometric="rgb", extratags=tags)
    content = stream.getvalue()
    image = decode.open_image(content)
    assert decode.read_header(content).size == image.size[::-1]
    np.testing.assert_array_equal(np.asarray(image), shown(scene(), orientation))


def test_damaged_exif_turns_nothing():
    stream = io.BytesIO()
    Image.fromarray(scene()).save(stream, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode.decode_array(stream.getvalue(), RGB), scene())


def test_a_folder_of_turned_photographs(tmp_path):
    """Checked, prepared, trained on and evaluated as they are shown."""
    root = make_folder(tmp_path / "src")
    upright = {}
    for path in sorted((root / "images").iterdir()):
        upright[path.stem] = np.asarray(Image.open(path)).copy()
        path.write_bytes(with_exif(np.rot90(upright[path.stem]).copy(), 6))
    source = registry.read_source("folder", str(root))
    report = check.check_source(source)
    assert report.problems == ()
    registry.prepare(source, report.present, str(tmp_path / "data"))
    config = config_for(tmp_path / "data", "folder", split="full", crop=24)
    config.data.scale_min = config.data.scale_max = 1.0
    config.data.flip = False
    evaluation = build.build_eval(config)
    for i, key in enumerate(evaluation.ids):
        assert evaluation.size(i) == (20, 24)
        np.testing.assert_array_equal(evaluation[i].image, upright[key])
    for resident in (False, True):
        config.data.resident = resident
        pipeline = build.build_train(config, Streams())
        batch = _first(pipeline)
        for crop, place in zip(batch.labeled.image, batch.labeled.index, strict=True):
            key = pipeline.split.labeled[place]
            np.testing.assert_array_equal(crop[:20], upright[key])


def _first(pipeline: TrainPipeline):
    iterator = pipeline.iterator()
    try:
        batch = next(iterator)
    finally:
        iterator.close()
    if pipeline.device_cache is None:
        return batch
    arrays = jax.tree.map(jnp.asarray, pipeline.device_cache.arrays)
    return pipeline.device_cache.cut(arrays, batch)


def write_deep(root, change, dtype=np.float32):
    """`make_folder` with three channels of another type, changed one by one."""
    make_folder(root)
    for path in sorted((root / "images").iterdir()):
        array = np.asarray(Image.open(path)).astype(dtype)
        path.unlink()
        np.save(path.with_suffix(".npy"), change(int(path.stem[2:]), array))
    return root


def declare(root, **facts):
    content = {"classes": ["a", "b", "c"], **facts}
    (root / "classes.json").write_text(json.dumps(content))


def check_folder(root):
    return check.check_source(registry.read_source("folder", str(root)))


def missing_rows(value):
    def change(number, array):
        array[:4] = value
        array[6, 7, 1] = value  # One channel alone.
        return array + 0 * number

    return change


@pytest.mark.parametrize("value", [-9999, -3.4028234663852886e38, np.nan, np.inf])
def test_missing_values_are_found_named_declared_and_filled(value, tmp_path):
    root = write_deep(tmp_path / "src", missing_rows(value))
    found = check_folder(root).problems
    if np.isfinite(value):
        (problem,) = found
        assert "im00.npy: value" in problem
        assert "channel 1, 2, 3" in problem and "in 12 images" in problem
        advice = problem.partition('"nodata": ')[2]
        declared, _ = json.JSONDecoder().raw_decode(advice)
    else:
        assert len(found) == 12
        assert all("289 values that are NaN or infinite" in text for text in found)
        assert '"nodata": ["nan"]' in found[0]
        declared = ["nan"]
    declare(root, nodata=declared)
    source = registry.read_source("folder", str(root))
    report = check.check_source(source)
    assert report.problems == ()
    trained = [np.load(sample.image) for sample in source.splits["train"]]
    stored = np.stack(trained).astype(float)
    right = np.isfinite(stored) & (stored > -1000)
    mean = np.array([stored[..., i][right[..., i]].mean() for i in range(3)])
    pixels = report.measured
    assert max(pixels.high) <= 255 and min(pixels.low) >= 0
    np.testing.assert_allclose(pixels.nodata_fill, mean, rtol=1e-12)
    np.testing.assert_allclose(
        np.array(pixels.mean) * 255 / np.array(pixels.high), mean / 255, rtol=0.05
    )
    source = dataclasses.replace(source, pixels=pixels)
    registry.prepare(source, report.present, str(tmp_path / "data"))
    config = config_for(tmp_path / "data", "folder", split="full")
    evaluation = build.build_eval(config)
    example = evaluation[0]
    path = root / "images" / f"{evaluation.ids[0]}.npy"
    assert (example.label[:4] == 255).all()
    mask = np.asarray(Image.open(root / "masks" / f"{path.stem}.png"))
    np.testing.assert_array_equal(example.label[4:], mask[4:])
    single = mean.astype(np.float32)
    np.testing.assert_array_equal(example.image[:4], np.tile(single, (4, 24, 1)))
    assert example.image[6, 7, 1] == single[1]
    # Prediction reads the file itself, by the facts of the run.
    facts = json.loads(json.dumps(dataclasses.asdict(evaluation.info.facts)))
    again = PixelFormat(**facts["pixels"])
    np.testing.assert_array_equal(
        decode.decode_array(path.read_bytes(), again), example.image
    )


def test_a_second_value_that_seems_missing_is_not_forgotten(tmp_path):
    def change(number, array):
        array[0], array[1] = -9999, -32768
        return array + 0 * number

    root = write_deep(tmp_path / "src", change)
    (problem,) = check_folder(root).problems
    assert "value -32768 in channel 1, 2, 3" in problem
    declare(root, nodata=[-32768])
    report = check_folder(root)
    assert report.problems == ()
    (warning,) = report.warnings
    assert "value -9999 in channel 1, 2, 3" in warning
    declare(root, nodata=[-32768, -9999])
    report = check_folder(root)
    assert report.problems == report.warnings == ()


def test_a_type_that_images_cannot_have_is_named(tmp_path):
    root = make_folder(tmp_path / "src")
    for path in (root / "images").iterdir():
        array = np.asarray(Image.open(path))[..., 0].astype(np.int16) - 50
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), array)
    found = check_folder(root).problems
    assert len(found) == 12
    assert found[0].endswith(
        "values are int16; convert them to one of uint8, uint16, float32"
    )


def test_missing_bytes_are_filled_as_well(tmp_path):
    root = make_folder(tmp_path / "src")
    for path in (root / "images").iterdir():
        array = np.maximum(np.asarray(Image.open(path)), 1)
        array[:, :5] = 0
        Image.fromarray(array).save(path)
    declare(root, nodata=0)
    source = registry.read_source("folder", str(root))
    report = check.check_source(source)
    source = dataclasses.replace(source, pixels=report.measured)
    registry.prepare(source, report.present, str(tmp_path / "data"))
    example = build.build_eval(config_for(tmp_path / "data", "folder"))[0]
    fill = np.rint(report.measured.nodata_fill)
    assert 120 < fill.min() <= fill.max() < 136
    np.testing.assert_array_equal(example.image[:, :5], np.tile(fill, (20, 5, 1)))
    assert (example.label[:, :5] == 255).all()


def test_what_seems_missing_may_be_measured(tmp_path):
    root = write_deep(
        tmp_path / "src",
        lambda i, a: np.where(a == 255, np.uint16(60255), a + 0 * i),
        np.uint16,
    )
    (problem,) = check_folder(root).problems
    assert "value 60255 in channel 1, 2, 3, far from all others" in problem
    declare(root, nodata=[])
    report = check_folder(root)
    assert report.problems == ()
    assert max(report.measured.high) == 60255


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 2), (7,), tuple(range(200))])
def test_ordinary_values_are_not_asked_about(values, tmp_path):
    def change(number, array):
        return np.resize(np.array(values, array.dtype), array.shape) + 0 * number

    assert check_folder(write_deep(tmp_path / "src", change)).problems == ()


def test_images_start_no_program():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    others = [eps]
    for kind in ("GIF", "PPM", "DDS", "AVIF"):
        stream = io.BytesIO()
        Image.fromarray(scene()).save(stream, kind)
        others.append(stream.getvalue())
    for content in others:
        for read in (
            lambda c: decode.decode_array(c, RGB),
            decode.read_header,
            decode_mask,
        ):
            with pytest.raises(UnreadableImage, match="not a PNG, JPEG, BMP"):
                read(content)


def deflated(size):
    """A deflate stream of `size` zeros, made a part at a time."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def bomb_tiff(packed, rows=64, columns=64):
    """A float TIFF whose only strip is `packed`."""
    stream = io.BytesIO()
    tifffile.imwrite(
        stream,
        iter([packed]),
        shape=(rows, columns),
        dtype=np.float32,
        compression="zlib",
        rowsperstrip=rows,
    )
    return stream.getvalue()


def test_what_unpacks_to_too_much_is_refused(monkeypatch):
    pixels = PixelFormat(1, (0.0,), (1.0,), "float32")
    monkeypatch.setattr(raster_formats, "MAX_BYTES", 4 << 20)
    for content in (bomb_tiff(deflated(8 << 20)), bomb_tiff(b"", 2048, 2048)):
        with pytest.raises(UnreadableImage, match=r"more than (the limit of )?4194304"):
            decode.decode_array(content, pixels)
    stream = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(stream, "PNG")
    with pytest.raises(UnreadableImage, match="more than the limit of 4194304"):
        decode.decode_array(stream.getvalue(), RGB)
    fits = bomb_tiff(zlib.compress(np.ones((64, 64), np.float32).tobytes()))
    assert decode.decode_array(fits, pixels).mean() == 1


def test_volumes_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raster_formats, "MAX_BYTES", 4 << 20)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:  # Nothing but a shape is stored.
        file.create_dataset("image", (8, 1024, 1024), "f4", chunks=(1, 64, 64))
        file.create_dataset("label", (8, 1024, 1024), "u1", chunks=(1, 64, 64))
    assert path.stat().st_size < 10_000
    with pytest.raises(UnreadableImage, match="more than the limit of 4194304"):
        volumes.from_h5(path).depth()
    with h5py.File(path, "w") as file:
        for key in ("image", "label"):
            made = file.create_dataset(
                key, (1, 64, 64), "f4", chunks=(1, 64, 64), compression="gzip"
            )
            made.id.write_direct_chunk((0, 0, 0), deflated(8 << 20))
    with pytest.raises(UnreadableImage, match="decompresses to more than 4194304"):
        volumes.from_h5(path).depth()
    small = nibabel.nifti1.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4))
    (tmp_path / "a.nii.gz").write_bytes(
        gzip.compress(small.to_bytes() + bytes(8 << 20))
    )
    huge = nibabel.nifti1.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4))
    huge.header["dim"][1:4] = 2000
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(huge.header.binaryblock))
    for name in ("a.nii.gz", "b.nii.gz"):
        volume = volumes.from_nifti(tmp_path / name, tmp_path / name)
        with pytest.raises(UnreadableImage, match=r"more than (the limit of )?4194304"):
            volume.depth()


def test_too_little_memory_is_one_line(tmp_path):
    """In a process of its own, of which the limit is taken."""
    stream = io.BytesIO()
    Image.new("RGB", (12000, 12000)).save(stream, "PNG", compress_level=1)
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    code = f"""
import pathlib, resource
from mpmc_jax.data import decode
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import RGB
content = pathlib.Path({str(tmp_path / "a.png")!r}).read_bytes()
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = used * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decode.decode_array(content, RGB)
except UnreadableImage as error:
    print("told:", error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("told: ") and done.stdout.count("\n") == 1
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_gray_images_of_few_bits_keep_their_look():
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(stream, "PNG")
    assert decode.decode_array(stream.getvalue(), GRAY).ravel().tolist() == [0, 255]
