"""Reads stacks of images one at a time: NIfTI volumes and TIFF files of several pages.

A stack may be larger than memory: a slice is read when it is asked for. Files are not
trusted, see `raster_formats`. Slices of NIfTI are (Y,X), as in the published ACDC.
"""

import contextlib
import dataclasses
import gzip
import math
import mmap
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tifffile
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from PIL import Image

from mpmc_jax.data import raster_formats
from mpmc_jax.data.decode import as_array, is_picture
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import first_line, quantity

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)
_ORIENTATION = 274
_CHUNK = 1 << 20  # bytes

# Tags of a TIFF file as tifffile writes them: code, type, count, value, written once.
Tags = tuple[tuple[int, Any, int, Any, bool], ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Images of one size, read one at a time, from any thread.

    Attributes:
      size: rows and columns of every image.
      depth: number of images.
      read: index -> (h,w,c) of the data set's type.
      close: closes the file.
      nifti: the volume's header and affine, for results on the same grid; None for
        other files.
    """

    size: tuple[int, int]
    depth: int
    read: Callable[[int], np.ndarray]
    close: Callable[[], None]
    nifti: Nifti1Image | None = None


def is_nifti(path: pathlib.Path) -> bool:
    """Whether a file's name is that of a NIfTI volume."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def inspect_tiff(path: pathlib.Path, pixels: PixelFormat) -> tuple[bool, Tags]:
    """Finds out whether a TIFF's pages are several images, and where on earth it is.

    Pages of one sample are channels of one image where there are as many as the data
    set has, unless its images are 8-bit gray or RGB: those have their channels in one
    page.

    Returns:
      Whether the pages are several images; and the tags of the georeference, () without
      one or where pixels are not stored as they are shown. A file that is damaged, or
      no TIFF, has neither.
    """
    with _tiff_or_none(path) as tiff:
        images = [] if tiff is None else raster_formats.image_pages(tiff)
        if tiff is None or not images:
            return False, ()
        first = tiff.pages[images[0]].aspage()
        channels = (
            not is_picture(pixels)
            and len(images) == pixels.channels
            and first.samplesperpixel == 1
        )
        found = [first.tags[code] for code in _GEOREFERENCE if code in first.tags]
        if _ORIENTATION in first.tags and first.tags[_ORIENTATION].value != 1:
            found = []
        tags = tuple((t.code, t.dtype, t.count, t.value, True) for t in found)
        return len(images) > 1 and not channels, tags


@contextlib.contextmanager
def _tiff_or_none(path: pathlib.Path) -> Iterator[tifffile.TiffFile | None]:
    """Opens a TIFF; None for other and damaged files, which their reader names."""
    with path.open("rb") as file:
        is_tiff = raster_formats.is_tiff(file.read(4))
    with contextlib.ExitStack() as files:
        try:
            tiff = files.enter_context(tifffile.TiffFile(path)) if is_tiff else None
            found = tiff if tiff and len(tiff.pages) and tiff.pages.first.tags else None
        except Exception:  # tifffile raises many errors for damaged files.
            found = None
        yield found


def open_stack(path: pathlib.Path, pixels: PixelFormat) -> Stack:
    """Opens a NIfTI volume, or a TIFF file whose pages are several images.

    A volume is scaled from its least and largest value to the range of the data set's
    images, as ACDC is prepared.

    Raises:
      UnreadableImage: damaged, or images of another kind than the data set's.
    """
    with contextlib.ExitStack() as files:
        try:
            opened = (_nifti if is_nifti(path) else _tiff)(path, pixels, files)
        except (UnreadableImage, OSError):
            raise
        # Neither nibabel's nor tifffile's errors have a common base class.
        except Exception as error:
            raise UnreadableImage(
                f"truncated or damaged ({first_line(error)}); copy it again"
            ) from error
        return dataclasses.replace(opened, close=files.pop_all().close)


def _nifti(
    path: pathlib.Path, pixels: PixelFormat, files: contextlib.ExitStack
) -> Stack:
    if pixels.channels != 1:
        raise UnreadableImage(
            f"a volume has one channel, but the data set has {pixels.channels}"
        )
    plain = path
    if path.name.lower().endswith(".gz"):
        folder = files.enter_context(tempfile.TemporaryDirectory())
        plain = pathlib.Path(folder, "volume.nii")
        _unzip(path, plain)
    volume = Nifti1Image.from_filename(str(plain))
    shape = tuple(map(int, volume.shape))
    if len(shape) != 3 or min(shape) < 1:
        raise UnreadableImage(f"the volume has shape {shape}; (X,Y,slices) is needed")
    raster_formats.check_bytes(shape[:2], np.dtype(np.float64))

    def values(index: int) -> np.ndarray:
        stored = np.asarray(volume.dataobj[..., index], np.float64)
        if not np.isfinite(stored).all():
            raise UnreadableImage(f"slice {index + 1} holds values that are not finite")
        return stored.T

    ranges = [(x.min(), x.max()) for x in map(values, range(shape[2]))]
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    if not low < high:
        raise UnreadableImage(f"the volume is {low} everywhere")

    def read(index: int) -> np.ndarray:
        unit = ((values(index) - low) / (high - low)).astype(np.float32)
        return pixels.stored(unit[..., None])

    return Stack((shape[1], shape[0]), shape[2], read, files.close, volume)


def _unzip(path: pathlib.Path, plain: pathlib.Path) -> None:
    """Decompresses a volume to a file, as many bytes as its header announces."""
    with gzip.open(path) as packed, plain.open("wb") as file:
        header = Nifti1Header.from_fileobj(packed)
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
        left = int(header.get_data_offset()) + dtype.itemsize * math.prod(shape)
        packed.seek(0)
        while left > 0 and (part := packed.read(min(left, _CHUNK))):
            file.write(part)
            left -= len(part)


def _tiff(
    path: pathlib.Path, pixels: PixelFormat, files: contextlib.ExitStack
) -> Stack:
    tiff = files.enter_context(tifffile.TiffFile(path))
    with path.open("rb") as file:
        content = files.enter_context(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        )
    pages = raster_formats.image_pages(tiff)
    first = tiff.pages[pages[0]].aspage()
    rows, columns = int(first.imagelength), int(first.imagewidth)
    turned = _ORIENTATION in first.tags and first.tags[_ORIENTATION].value > 4
    size = (columns, rows) if turned else (rows, columns)
    lock = threading.Lock()

    def read(index: int) -> np.ndarray:
        with lock:  # tifffile seeks in the file.
            page = tiff.pages[pages[index]].aspage()
            raster_formats.check_bytes(page.shape, np.dtype(page.dtype))
            raster_formats.check_segments(content, page)
            values = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
        tag = page.tags.get(_ORIENTATION)
        values = raster_formats.orient(values, tag.value if tag else 1)
        if values.shape[:2] != size:
            raise UnreadableImage(
                f"page {index + 1} has another size than the first; store its pages "
                "as files of their own"
            )
        return _convert(values, index, pixels)

    return Stack(size, len(pages), read, files.close)


def _convert(values: np.ndarray, index: int, pixels: PixelFormat) -> np.ndarray:
    """Converts a page to (h,w,c) of the data set's type; bytes to gray or RGB."""
    page = np.ascontiguousarray(np.atleast_3d(values))
    if is_picture(pixels) and page.dtype == np.uint8 and page.shape[2] in (1, 3, 4):
        picture = Image.fromarray(page[..., 0] if page.shape[2] == 1 else page)
        page = as_array(picture.convert("L" if pixels.channels == 1 else "RGB"))
    found = (page.dtype.name, page.shape[2])
    if found != (pixels.dtype, pixels.channels):
        raise UnreadableImage(
            f"page {index + 1} has {quantity(found[1], 'channel')} of {found[0]}, but "
            f"the data set has {pixels.channels} of {pixels.dtype}"
        )
    missing = pixels.missing(page)
    raster_formats.check_finite(page, missing)
    return page if missing is None else pixels.fill(page, missing)
