"""Reads images that Pillow cannot hold: more than 8 bits, or any number of channels.

The formats are NumPy's .npy and TIFF, the latter by tifffile. Files are not trusted:
headers are checked before memory is allocated, nothing is unpickled, and nothing is
decompressed beyond `MAX_BYTES`.
"""

import dataclasses
import io
import math
import mmap
import threading
import zlib

import numpy as np
import tifffile
from PIL import Image

from mpmc_jax.text import first_line

DTYPES = ("uint8", "uint16", "float32")
# The largest size of a decoded image or volume.
MAX_BYTES = 1 << 30
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Headers are parsed as Python, one at a time: at times CPython 3.11's parser takes the
# depth of another thread's tree for its own, and raises SystemError.
_PARSING = threading.Lock()
# A larger last axis is taken for rows or columns, with the channels first.
_MOST_CHANNELS = 64
# Compressions of TIFF that are read. Others need further libraries, or decompress
# without a limit.
_COMPRESSIONS = frozenset(
    (
        tifffile.COMPRESSION.NONE,
        tifffile.COMPRESSION.LZW,
        tifffile.COMPRESSION.ADOBE_DEFLATE,
        tifffile.COMPRESSION.DEFLATE,
        tifffile.COMPRESSION.PACKBITS,
    )
)
_DEFLATE = (tifffile.COMPRESSION.ADOBE_DEFLATE, tifffile.COMPRESSION.DEFLATE)
# The largest compression ratio of a deflate stream.
_DEFLATE_RATIO = 1032
_ORIENTATION = 274


class UnreadableImage(ValueError):
    """An image or mask that cannot be decoded; the message says why."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Size and type of an image, from its file's header.

    Attributes:
      size: rows and columns, as a viewer shows them (see `orient`).
      channels: number of channels.
      dtype: type of the values, one of `DTYPES`.
    """

    size: tuple[int, int]
    channels: int
    dtype: str


def is_array(content: bytes) -> bool:
    """Returns whether encoded bytes are a .npy file."""
    return content.startswith(_NPY)


def is_tiff(content: bytes) -> bool:
    """Returns whether encoded bytes are a TIFF file."""
    return content.startswith(_TIFF)


def exceeds_pillow(content: bytes) -> bool:
    """Returns whether a TIFF holds what Pillow would silently leave out.

    That is a second page, a further channel other than alpha, or a color's lower bits.

    Raises:
      UnreadableImage: the file is damaged.
    """
    with _open_tiff(content) as tiff:
        try:
            page = tiff.pages.first
            alphas = sum(kind in (1, 2) for kind in page.extrasamples)
            bands = page.samplesperpixel - alphas
            separated = page.photometric == tifffile.PHOTOMETRIC.SEPARATED
            color = bands == 3 or (bands == 4 and separated)
            whole = bands == 1 or (color and page.bitspersample == 8)
            return len(image_pages(tiff)) > 1 or page.is_reduced or not whole
        except Exception as error:  # See `_open_tiff`.
            raise UnreadableImage(
                f"not a TIFF file of one image ({first_line(error)})"
            ) from error


def image_pages(tiff: tifffile.TiffFile) -> list[int]:
    """Lists the pages of a TIFF without smaller copies and masks of other pages."""
    pages = enumerate(page.aspage() for page in tiff.pages)
    return [i for i, page in pages if not page.is_reduced and not page.is_mask]


def type_of_tiff(content: bytes) -> str:
    """Returns the name of the type of a TIFF's values.

    Raises:
      UnreadableImage: the file is damaged, or holds several images.
    """
    with _open_tiff(content) as tiff:
        return _tiff_shape(tiff)[1].name


def is_deep_color(content: bytes) -> bool:
    """Returns whether encoded bytes are a 16-bit PNG that Pillow reads as 8 bits.

    These have color or alpha; Pillow reads gray alone with all its bits.
    """
    kinds = (b"\x10\x02", b"\x10\x04", b"\x10\x06")
    return content.startswith(_PNG) and content[24:26] in kinds


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels as a viewer shows them.

    Args:
      array: (h,w) or (h,w,c).
      orientation: tag 274 of EXIF and TIFF, 1 to 8; other values change nothing.
    """
    if 5 <= orientation <= 8:
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def read_header(content: bytes) -> Header:
    """Reads the header of a .npy or TIFF file.

    Raises:
      UnreadableImage: damaged, not an image, too large, or not one of `DTYPES`.
    """
    header = _stored_header(content)
    if header.dtype not in DTYPES:
        raise UnreadableImage(
            f"values are {header.dtype}; convert them to one of {', '.join(DTYPES)}"
        )
    return header


def read_array(content: bytes) -> np.ndarray:
    """Reads the pixels (h,w,c) of a .npy or TIFF file, in native byte order.

    Raises:
      UnreadableImage: see `read_header`; or the file is truncated.
    """
    read_header(content)
    return read_values(content)


def read_values(content: bytes) -> np.ndarray:
    """Reads pixels like `read_array`, of any number type; masks may have others."""
    header = _stored_header(content)
    if is_array(content):
        pixels, orientation = _read_npy(content), 1
    else:
        pixels, orientation = _read_tiff(content)
    rows, columns = header.size[::-1] if orientation > 4 else header.size
    if pixels.size != rows * columns * header.channels:
        raise UnreadableImage(
            f"truncated or damaged ({pixels.size} values, and its header has "
            f"{rows} x {columns} x {header.channels}); copy it again"
        )
    pixels = orient(pixels.reshape(rows, columns, header.channels), orientation)
    return np.ascontiguousarray(pixels, header.dtype)


def _stored_header(content: bytes) -> Header:
    """Reads the header of a .npy or TIFF file whose numbers have any type."""
    if is_array(content):
        shape, dtype, _, _ = _npy_header(content)
        return _checked(shape, np.dtype(dtype))
    with _open_tiff(content) as tiff:
        shape, dtype = _tiff_shape(tiff)
        header = _checked(shape, dtype)
        if _orientation(tiff) > 4:
            header = dataclasses.replace(header, size=header.size[::-1])
    return header


def write_array(array_hwc: np.ndarray) -> bytes:
    """Encodes (h,w,c) as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array_hwc), allow_pickle=False)
    return stream.getvalue()


def check_finite(array_hwc: np.ndarray, missing: np.ndarray | None = None) -> None:
    """Raises UnreadableImage if a value that is not missing is NaN or infinite."""
    if array_hwc.dtype.kind != "f" or np.isfinite(array_hwc).all():
        return
    wrong = ~np.isfinite(array_hwc)
    if missing is not None:
        wrong &= ~missing
    if wrong.any():
        raise UnreadableImage(
            f"holds {int(wrong.sum())} values that are NaN or infinite; if they are "
            'missing data, write "nodata": ["nan"] in classes.json'
        )


def check_bytes(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises UnreadableImage if an array would be larger than `MAX_BYTES`."""
    size = math.prod(map(int, shape)) * dtype.itemsize
    if size > MAX_BYTES:
        raise UnreadableImage(
            f"{' x '.join(map(str, shape))} values of {dtype.name} are {size} bytes, "
            f"more than the limit of {MAX_BYTES}, which applies because files are not "
            "trusted: cut the image into tiles"
        )


def may_unpack_too_much(packed_bytes: int) -> bool:
    """Returns whether a deflate stream of this length may exceed `MAX_BYTES`."""
    return packed_bytes * _DEFLATE_RATIO > MAX_BYTES


def check_deflated(packed: bytes) -> None:
    """Raises UnreadableImage if a deflate stream unpacks to more than `MAX_BYTES`."""
    if not may_unpack_too_much(len(packed)):
        return
    unpacker, left = zlib.decompressobj(), MAX_BYTES
    while packed and not unpacker.eof:
        try:
            left -= len(unpacker.decompress(packed, 1 << 20))
        except zlib.error:
            return  # The reader that decompresses it reports the damage.
        packed = unpacker.unconsumed_tail
        if left < 0:
            raise UnreadableImage(
                f"refused: a part of it decompresses to more than {MAX_BYTES} bytes"
            )


def _npy_header(content: bytes) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Reads shape, type, whether the order is Fortran's, and the data's offset."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version}")
        with _PARSING:
            shape, fortran, dtype = _HEADERS[version](stream)
    # A damaged header raises many errors, because it is parsed as Python.
    except Exception as error:
        raise UnreadableImage(
            f"not a .npy file of an image ({first_line(error)})"
        ) from error
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
            f"{count * dtype.itemsize} expected); copy it again"
        )
    flat = np.frombuffer(content, dtype, count, start)
    return flat.reshape(shape, order="F" if fortran else "C")


def _open_tiff(content: bytes) -> tifffile.TiffFile:
    try:
        tiff = tifffile.TiffFile(io.BytesIO(content))
        if len(tiff.series) != 1:
            raise ValueError(f"{len(tiff.series)} pictures of different shapes")
    # tifffile raises many errors for damaged files, such as struct.error and KeyError.
    except Exception as error:
        raise UnreadableImage(
            f"not a TIFF file of one image ({first_line(error)})"
        ) from error
    return tiff


def _channels_first(series: tifffile.TiffPageSeries) -> bool:
    """Returns whether the first axis has the channels; if unnamed, the shortest has."""
    if len(series.shape) != 3:
        return False
    unnamed = series.axes[0] == "Q"
    return series.axes[0] in "SCI" or (unnamed and series.shape[0] < series.shape[2])


def _tiff_shape(tiff: tifffile.TiffFile) -> tuple[tuple[int, ...], np.dtype]:
    """Returns rows, columns and channels (if any) of a TIFF, and its values' type."""
    try:
        series = tiff.series[0]
        shape = tuple(map(int, series.shape))
        if _channels_first(series):
            shape = (*shape[1:], shape[0])
        return shape, np.dtype(series.dtype)
    except Exception as error:  # See `_open_tiff`.
        raise UnreadableImage(
            f"not a TIFF file of one image ({first_line(error)})"
        ) from error


def _orientation(tiff: tifffile.TiffFile) -> int:
    tag = tiff.pages.first.tags.get(_ORIENTATION)
    known = tag is not None and isinstance(tag.value, int) and 1 <= tag.value <= 8
    return int(tag.value) if known else 1


def _read_tiff(content: bytes) -> tuple[np.ndarray, int]:
    """Reads pixels as they are stored, channels last, and their orientation."""
    with _open_tiff(content) as tiff:
        series = tiff.series[0]
        try:
            for page in series.pages:
                if page is not None:
                    check_segments(content, page)
            pixels = series.asarray()
        except UnreadableImage:
            raise
        except Exception as error:  # See `_open_tiff`.
            raise UnreadableImage(
                f"cannot be decoded ({first_line(error)}); store it uncompressed or "
                "with deflate"
            ) from error
        if _channels_first(series):
            pixels = np.moveaxis(pixels, 0, -1)
        return pixels, _orientation(tiff)


def check_segments(
    content: bytes | mmap.mmap, page: tifffile.TiffPage | tifffile.TiffFrame
) -> None:
    """Raises UnreadableImage if a strip or tile decompresses to too many bytes."""
    page = page.aspage()
    if page.compression not in _COMPRESSIONS:
        raise ValueError(f"compression {page.compression}")
    check_bytes(page.chunks, np.dtype(page.dtype))
    if page.compression in _DEFLATE:
        places = zip(page.dataoffsets, page.databytecounts, strict=False)
        for start, count in places:
            check_deflated(content[start : start + count])


def _checked(shape: tuple[int, ...], dtype: np.dtype) -> Header:
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or min(shape) < 1:
        raise UnreadableImage(
            f"shape {shape} is not that of an image; (h,w) or (h,w,c) is"
        )
    rows, columns, channels = shape
    if channels > _MOST_CHANNELS:
        raise UnreadableImage(
            f"shape {shape} has {channels} channels; they come last, and "
            f"{_MOST_CHANNELS} is the most"
        )
    if rows * columns > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UnreadableImage(
            f"{rows} x {columns} pixels exceed twice Pillow's limit "
            f"(Image.MAX_IMAGE_PIXELS, {Image.MAX_IMAGE_PIXELS}), which applies "
            "because files are not trusted: cut the image into tiles"
        )
    if dtype.kind not in "buif":
        raise UnreadableImage(f"values are {dtype}; numbers are needed")
    check_bytes(shape, dtype)
    return Header((rows, columns), channels, dtype.name)
