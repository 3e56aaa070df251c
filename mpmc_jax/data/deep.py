"""Images that Pillow does not hold: more than 8 bits, or any number of channels.

Three formats: NumPy's .npy, TIFF by tifffile, and Pillow's 16-bit grey. Files are not
trusted: headers are looked at before a byte is allocated, and nothing is unpickled.
"""

import dataclasses
import io
import math
import struct

import numpy as np
import tifffile
from PIL import Image

DTYPES = ("uint8", "uint16", "float32")
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# More are rows or columns of an array whose channels come first.
_MOST_CHANNELS = 64


class UnreadableImage(ValueError):
    """An image or mask that cannot be turned into pixels; the text says why."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image says of itself before it is decoded.

    Attributes:
      size: rows and columns.
      channels: of a pixel.
      dtype: of a value, one of `DTYPES`.
    """

    size: tuple[int, int]
    channels: int
    dtype: str


def is_array(content: bytes) -> bool:
    """Whether encoded bytes are a .npy file."""
    return content.startswith(_NPY)


def is_tiff(content: bytes) -> bool:
    """Whether encoded bytes are a TIFF file."""
    return content.startswith(_TIFF)


def is_more_than_pillows(content: bytes) -> bool:
    """Whether a TIFF holds what Pillow would leave out without a word.

    That is a second page, a band that is no alpha, or a colour's lower bits.

    Raises:
      UnreadableImage: it is damaged.
    """
    with _open_tiff(content) as tiff:
        page = tiff.pages.first
        alphas = sum(kind in (1, 2) for kind in page.extrasamples)
        bands = page.samplesperpixel - alphas
        separated = page.photometric == tifffile.PHOTOMETRIC.SEPARATED
        colour = bands == 3 or (bands == 4 and separated)
        whole = bands == 1 or (colour and page.bitspersample == 8)
        return len(tiff.pages) > 1 or not whole


def is_deep_colour(content: bytes) -> bool:
    """Whether encoded bytes are a colour PNG of 16 bits, which Pillow reads as 8."""
    return content.startswith(_PNG) and content[24:26] in (b"\x10\x02", b"\x10\x06")


def read_header(content: bytes) -> Header:
    """The header of a .npy or TIFF file.

    Raises:
      UnreadableImage: damaged, no image, too large, or of another type of value.
    """
    if is_array(content):
        shape, dtype, _, _ = _npy_header(content)
    else:
        with _open_tiff(content) as tiff:
            series = tiff.series[0]
            shape, dtype = series.shape, series.dtype
            if _channels_first(series):
                shape = (*shape[1:], shape[0])
    return _checked(shape, np.dtype(dtype))


def read_array(content: bytes) -> np.ndarray:
    """The pixels of a .npy or TIFF file, (h,w,c) in the byte order of this machine.

    Raises:
      UnreadableImage: see `read_header`; or the data end too early.
    """
    header = read_header(content)
    pixels = _read_npy(content) if is_array(content) else _read_tiff(content)
    pixels = pixels.reshape(*header.size, header.channels)
    return np.asarray(pixels, header.dtype)


def write_array(array_hwc: np.ndarray) -> bytes:
    """(h,w,c) -> the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array_hwc), allow_pickle=False)
    return stream.getvalue()


def check_finite(array_hwc: np.ndarray) -> None:
    """Raises UnreadableImage if a value is NaN or infinite."""
    if array_hwc.dtype.kind == "f" and not np.isfinite(array_hwc).all():
        wrong = int((~np.isfinite(array_hwc)).sum())
        raise UnreadableImage(f"holds {wrong} values that are NaN or infinite")


def _npy_header(content: bytes) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, type, whether columns come first, and where the data begin."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = _HEADERS[version](stream)
    except (ValueError, SyntaxError, struct.error) as error:
        raise UnreadableImage(f"not a .npy file of an image ({error})") from error
    if dtype.hasobject:
        raise UnreadableImage(
            "holds Python objects (pickled), which are never loaded; save an array of "
            f"{', '.join(DTYPES)}"
        )
    return shape, dtype, fortran, stream.tell()


def _read_npy(content: bytes) -> np.ndarray:
    shape, dtype, fortran, start = _npy_header(content)
    count = math.prod(shape)
    if len(content) - start != count * dtype.itemsize:
        raise UnreadableImage(
            f"truncated or damaged ({len(content) - start} bytes of data, "
            f"{count * dtype.itemsize} expected)"
        )
    flat = np.frombuffer(content, dtype, count, start)
    return flat.reshape(shape, order="F" if fortran else "C")


def _open_tiff(content: bytes) -> tifffile.TiffFile:
    try:
        tiff = tifffile.TiffFile(io.BytesIO(content))
        if len(tiff.series) != 1:
            raise ValueError(f"{len(tiff.series)} pictures of different shapes")
    # A damaged file fails in many ways in there, struct.error and KeyError included.
    except Exception as error:
        raise UnreadableImage(f"not a TIFF file of one image ({error})") from error
    return tiff


def _channels_first(series: tifffile.TiffPageSeries) -> bool:
    return len(series.shape) == 3 and series.axes[0] in "SCI"


def _read_tiff(content: bytes) -> np.ndarray:
    with _open_tiff(content) as tiff:
        series = tiff.series[0]
        try:
            pixels = series.asarray()
        except Exception as error:  # See `_open_tiff`.
            raise UnreadableImage(
                f"cannot be decoded ({error}); store it uncompressed or with deflate"
            ) from error
        return np.moveaxis(pixels, 0, -1) if _channels_first(series) else pixels


def _checked(shape: tuple[int, ...], dtype: np.dtype) -> Header:
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or min(shape) < 1:
        raise UnreadableImage(f"shape {shape} is no image; (h,w) or (h,w,c) is")
    rows, columns, channels = shape
    if channels > _MOST_CHANNELS:
        raise UnreadableImage(
            f"shape {shape}: {channels} channels? they come last, {_MOST_CHANNELS} at "
            "most"
        )
    if rows * columns > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UnreadableImage(
            f"{rows} x {columns} pixels exceed twice Pillow's limit "
            f"(Image.MAX_IMAGE_PIXELS, {Image.MAX_IMAGE_PIXELS}), which is kept, as "
            "files are not trusted: cut the image into tiles"
        )
    if dtype.name not in DTYPES:
        raise UnreadableImage(
            f"values are {dtype.name}; convert them to one of {', '.join(DTYPES)}"
        )
    return Header((rows, columns), channels, dtype.name)
