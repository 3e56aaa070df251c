"""Damaged and hostile images: each is an array or `UnreadableImage`, and soon.

Seeded, so that a failure comes again; MPMC_FUZZ=1000 tries as many of each format.
"""

import contextlib
import gzip
import io
import logging
import os
import resource
import signal

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from mpmc_jax.data import decode, raster_formats
from mpmc_jax.data.builders import volumes
from mpmc_jax.data.masks import MaskFormat, read_mask
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import GRAY, RGB, PixelFormat

pytestmark = pytest.mark.filterwarnings("ignore")  # Of Pillow, of damaged EXIF.

TRIES = int(os.environ.get("MPMC_FUZZ", "30"))
_SECONDS = 20
_MEMORY = 1 << 30  # Beyond what the process holds before a file is read.

DEEP = PixelFormat(4, (0.0,), (1.0,), "uint16", nodata=(0, "nan"))
MASKS = (
    MaskFormat(),
    MaskFormat({(0, 0, 0): 0, (255, 0, 0): 1}, void=(0,), declared_in="x"),
    MaskFormat(binary=True, declared_in="x"),
)


def saved(array, kind, **settings):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **settings)
    return stream.getvalue()


def palette(array):
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    picture.putpalette([7, 8, 9] * 256)
    picture.save(stream, "PNG", transparency=3)
    return stream.getvalue()


def tiff(array, **settings):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **settings)
    return stream.getvalue()


def npy(array, version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def exif():
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


def seeds():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    four = rng.integers(0, 9999, (12, 16, 4), dtype=np.uint16)
    return {
        "PNG": saved(rgb, "PNG", exif=exif()),
        "gray PNG": saved(rgb[..., 0], "PNG"),
        "palette PNG": palette(rgb[..., 0] % 4),
        "16-bit PNG": saved(four[..., 0], "PNG"),
        "JPEG": saved(rgb, "JPEG", exif=exif()),
        "progressive JPEG": saved(rgb, "JPEG", progressive=True),
        "BMP": saved(rgb, "BMP"),
        "WebP": saved(rgb, "WEBP", exif=exif()),
        "lossless WebP": saved(rgb, "WEBP", lossless=True),
        "AVIF": saved(rgb, "AVIF"),
        "DDS": saved(rgb, "DDS"),
        "GIF": saved(rgb[..., 0], "GIF"),
        "Pillow's TIFF": saved(rgb, "TIFF", compression="tiff_lzw", exif=exif()),
        "TIFF": tiff(four, photometric="minisblack", planarconfig="contig"),
        "deflated TIFF": tiff(four[..., 0], compression="zlib", predictor=True),
        "tiled TIFF": tiff(four[..., 0].astype(np.float32), tile=(16, 16)),
        "BigTIFF": tiff((four[..., 0] % 4).astype(np.int16), bigtiff=True),
        "npy": npy(four, (1, 0)),
        "npy of version 2": npy((four[..., 0] % 4).astype(">i4"), (2, 0)),
    }


SEEDS = seeds()


def damaged(content, rng):
    """One of: bytes replaced, a piece cut out, doubled, or the end lost."""
    data = bytearray(content)
    kind = rng.integers(5)
    # Headers decide more than pixels do.
    reach = len(data) if rng.random() < 0.5 else min(len(data), 160)
    at = int(rng.integers(reach))
    length = int(rng.integers(1, 9))
    if kind < 2:
        for place in rng.integers(reach, size=length):
            data[place] = rng.integers(256)
    elif kind == 2:
        value = int(rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
        data[at : at + 4] = value.to_bytes(4, str(rng.choice(("big", "little"))))
    elif kind == 3:
        data[at : at + length] = data[at : at + length] * int(rng.integers(0, 4))
    else:
        del data[at:]
    return bytes(data)


@contextlib.contextmanager
def bounded():
    """Little time and memory; what takes more fails the test."""

    def late(number, frame):
        raise AssertionError(f"more than {_SECONDS} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def readers():
    for pixels in (RGB, GRAY, DEEP):
        yield lambda content, pixels=pixels: decode.decode_array(content, pixels)
    yield lambda content: np.array(decode.read_header(content).size)
    for form in MASKS:
        yield lambda content, form=form: read_mask(content, form).label_hw


def try_all(content, functions):
    """How many of the functions read it; fails on all but the two good outcomes."""
    read = 0
    for function in functions:
        try:
            with bounded():
                found = function(content)
        except UnreadableImage as error:
            text = str(error)
            assert text and "\n" not in text, text
            assert all(c.isprintable() for c in text), text
            continue
        assert isinstance(found, np.ndarray)
        assert found.nbytes <= raster_formats.MAX_BYTES
        read += 1
    return read


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setattr(raster_formats, "MAX_BYTES", 64 << 20)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("kind", SEEDS)
def test_every_outcome_is_an_array_or_a_line(kind):
    content = SEEDS[kind]
    rng = np.random.default_rng(sum(kind.encode()))
    known = kind not in ("AVIF", "DDS", "GIF")
    assert (try_all(content, readers()) > 0) == known
    for _ in range(TRIES):
        try_all(damaged(content, rng), readers())


HEADERS = (
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-3, 4), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (True, -4), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999, 4), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (3, 4), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (3, 4), }",
    "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (3, 4), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }",
    "{'descr': '<u2', 'fortran_order': 7, 'shape': (3, 4), }",
    "{'descr': 5, 'fortran_order': False, 'shape': (3, 4), }",
    "{'descr': '<u2'}",
    "[" * 3000,
    "(" * 3000 + ")" * 3000,
    "\0",
    "{**{}}",
    "",
)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("version", [1, 2, 3, 9])
def test_headers_of_numpy(header, version):
    size = 2 if version == 1 else 4
    text = header.encode()
    content = b"\x93NUMPY" + bytes([version, 0])
    content += len(text).to_bytes(size, "little") + text + bytes(24)
    assert try_all(content, readers()) == 0


def h5(**settings):
    stream = io.BytesIO()
    rng = np.random.default_rng(0)
    with h5py.File(stream, "w") as file:
        file.create_dataset("image", data=rng.random((3, 12, 16)), **settings)
        file.create_dataset("label", data=np.ones((3, 12, 16), "u1"), **settings)
    return stream.getvalue()


def nifti():
    values = np.random.default_rng(0).integers(0, 99, (16, 12, 3)).astype(np.int16)
    return nibabel.nifti1.Nifti1Image(values, np.eye(4)).to_bytes()


VOLUMES = {
    "h5": h5(),
    "h5, deflated": h5(compression="gzip", shuffle=True),
    "nifti": nifti(),
    "nifti, gzip": gzip.compress(nifti()),
}


def volume_readers(path, kind):
    """Depth, and image and mask of the first slice."""
    one = volumes.from_h5(path)
    if kind.startswith("nifti"):
        one = volumes.from_nifti(path, path)
    yield lambda content: np.array(one.depth())
    for blob in one.slice(0):
        yield blob.convert


@pytest.mark.parametrize("kind", VOLUMES)
def test_volumes(kind, tmp_path):
    content = VOLUMES[kind]
    path = tmp_path / "volume"
    rng = np.random.default_rng(sum(kind.encode()))
    functions = [
        lambda c, read=read: (
            np.frombuffer(read(c), np.uint8) if isinstance(read(c), bytes) else read(c)
        )
        for read in volume_readers(path, kind)
    ]
    path.write_bytes(content)
    assert try_all(content, functions) == 3
    for _ in range(TRIES):
        other = damaged(content, rng)
        path.write_bytes(other)
        try_all(other, functions)
