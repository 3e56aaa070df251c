"""Encoded bytes of images, and the arrays that they hold; of masks see `masks`.

Images of 8-bit gray or RGB are read by Pillow, others by `deep`. A record keeps the
former as they came (or uncompressed), the latter as .npy. Every image is turned as its
EXIF says, so that arrays are what a viewer shows.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpmc_jax.data import raster_formats
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import quantity

Color = tuple[int, int, int]
# 8-bit gray or RGB as Pillow holds it, anything else as (h,w,c).
Picture = Image.Image | np.ndarray

_GRAY = ("1", "L", "LA")
_EIGHT_BITS = (*_GRAY, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


# Pillow knows many more; some of them run another program, as EPS does.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_UNKNOWN = "not a PNG, JPEG, BMP, TIFF, WebP or .npy file"
# Where Pillow puts what may hold an orientation, and how PNG marks that in its bytes.
# TIFF files are turned by Pillow itself, the size that it gives before decoding too.
_EXIF_KEYS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
_EXIF_IN_PNG = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(content: bytes) -> Image.Image:
    """Opens encoded bytes, decodes them in full and turns them as EXIF says.

    Raises:
      UnreadableImage: not an image, a truncated one, or more than 8 bits a channel.
    """
    return open_turned(content)[0]


def open_turned(content: bytes) -> tuple[Image.Image, Image.Image]:
    """The image of `open_image`, and as it was opened: format, info and tags."""
    if not content:
        raise UnreadableImage("an empty file")
    if raster_formats.is_deep_color(content):
        raise UnreadableImage(
            "16 bits a color in a PNG, of which Pillow keeps 8; store TIFF or .npy"
        )
    if raster_formats.is_tiff(content) and raster_formats.is_more_than_pillows(content):
        raise UnreadableImage(
            "a TIFF with more channels, bits or pages than 8-bit gray or RGB have"
        )
    opened = _open(content)
    return _load(opened), opened


def _load(opened: Image.Image) -> Image.Image:
    """Decodes an opened image in full and turns it as EXIF says.

    Raises:
      UnreadableImage: it is truncated or damaged.
    """
    try:
        opened.load()
        turn = _TURNS.get(_orientation(opened))
        return opened if turn is None else opened.transpose(turn)
    # Pillow's decoders have no common error for damaged files.
    except Exception as error:
        raise UnreadableImage(
            f"truncated or damaged ({raster_formats.reason(error)}); copy it again"
        ) from error


def _open(content: bytes) -> Image.Image:
    """An image whose header was read.

    Raises:
      UnreadableImage: not an image, or one too large.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnreadableImage(_UNKNOWN) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"{error}; Pillow's pixel limit (Image.MAX_IMAGE_PIXELS) is kept, as files "
            "are not trusted: cut the image into tiles"
        ) from error
    except Exception as error:  # See `open_turned`.
        raise UnreadableImage(
            f"truncated or damaged ({raster_formats.reason(error)}); copy it again"
        ) from error
    raster_formats.check_bytes((*image.size, len(image.getbands())), np.dtype(np.uint8))
    return image


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 for TIFF (see above), and where EXIF is damaged, as viewers have it."""
    if image.format == "TIFF" or not _EXIF_KEYS & image.info.keys():
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def decode_image(content: bytes, channels: int) -> Image.Image:
    """Encoded bytes -> 8-bit image with 1 (mode L) or 3 (RGB) channels.

    Raises:
      UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    if image.mode[0] in "IF":
        if raster_formats.is_tiff(content):
            raster_formats.read_header(
                content
            )  # Names a type that no data set can have.
        raise UnreadableImage(
            f"more than 8 bits a channel (PIL mode {image.mode}); convert it to 8 bits"
        )
    return image.convert("L" if channels == 1 else "RGB")


def decode_array(content: bytes, pixels: PixelFormat) -> np.ndarray:
    """Encoded bytes -> (h,w,c) of the format's type, missing values filled.

    Raises:
      UnreadableImage: see `decode_stored`; a value that is not finite.
    """
    stored_hwc = decode_stored(content, pixels)
    missing_hwc = pixels.missing(stored_hwc)
    raster_formats.check_finite(stored_hwc, missing_hwc)
    return stored_hwc if missing_hwc is None else pixels.fill(stored_hwc, missing_hwc)


def decode_stored(content: bytes, pixels: PixelFormat) -> np.ndarray:
    """Encoded bytes -> (h,w,c) of the format's type, never one of another type.

    Raises:
      UnreadableImage: see `decode_image` and `deep`; another type or number of
        channels than the format's; too little memory.
    """
    try:
        if _is_pillows(content, pixels):
            return as_array(decode_image(content, pixels.channels))
        if raster_formats.is_array(content) or raster_formats.is_tiff(content):
            array_hwc = raster_formats.read_array(content)
        else:
            # uint16 from 16-bit gray; what is not is told by its type.
            array_hwc = np.atleast_3d(np.asarray(open_image(content)))
    except MemoryError as error:
        raise UnreadableImage(f"does not fit into memory ({error})") from error
    _check_type(array_hwc, pixels)
    return array_hwc


def _check_type(array_hwc: np.ndarray, pixels: PixelFormat) -> None:
    found = (array_hwc.dtype.name, array_hwc.shape[-1])
    if found != (pixels.dtype, pixels.channels):
        raise UnreadableImage(
            f"{quantity(found[1], 'channel')} of {found[0]}, but the data set has "
            f"{pixels.channels} of {pixels.dtype}; all images must agree"
        )


def _is_pillows(content: bytes, pixels: PixelFormat) -> bool:
    """Whether it is for Pillow to make 8-bit gray or RGB of an image."""
    return is_bytes(pixels) and not raster_formats.is_array(content)


def is_bytes(pixels: PixelFormat) -> bool:
    """Whether images are 8-bit gray or RGB, as picture files are."""
    return pixels.dtype == "uint8" and pixels.channels in (1, 3)


def read_header(content: bytes) -> raster_formats.Header:
    """Size, channels and type of an image, not decoded; RGB for all that has color.

    Raises:
      UnreadableImage: not an image, or see `deep`.
    """
    if raster_formats.is_array(content):
        return raster_formats.read_header(content)
    try:
        image = _open(content)
    except UnreadableImage:
        # A TIFF may still be one that Pillow does not know.
        if raster_formats.is_tiff(content):
            return raster_formats.read_header(content)
        raise
    mode = image.mode
    size = _shown_size(image, content)
    if raster_formats.is_tiff(content) and (
        mode not in _EIGHT_BITS or raster_formats.is_more_than_pillows(content)
    ):
        return raster_formats.read_header(content)
    if mode.startswith("I;16"):
        return raster_formats.Header(size, 1, "uint16")
    return raster_formats.Header(size, 1 if mode in _GRAY else 3, "uint8")


def _shown_size(opened: Image.Image, content: bytes) -> tuple[int, int]:
    """Rows and columns of an opened image once it is turned as EXIF says."""
    if opened.format == "PNG" and any(mark in content for mark in _EXIF_IN_PNG):
        _load(opened)  # EXIF may come after the pixels.
    columns, rows = opened.size
    return (columns, rows) if _orientation(opened) > 4 else (rows, columns)


def encode_record(content: bytes, pixels: PixelFormat, *, unpacked: bool) -> bytes:
    """An image's file -> what a record holds of it, as the module says.

    Raises:
      UnreadableImage: see `decode_array`.
    """
    if not _is_pillows(content, pixels) or pixels.nodata:
        array_hwc = decode_array(content, pixels)
        write = encode_png if is_bytes(pixels) else raster_formats.write_array
        return write(array_hwc)
    return unpack(content, pixels.channels) if unpacked else content


def image_format(pixels: PixelFormat) -> str:
    """How records hold images of a pixel format: "picture" or "npy".

    A "picture" is a file of 8-bit gray or RGB that Pillow reads, "npy" a NumPy array.
    """
    return "picture" if is_bytes(pixels) else "npy"


def record_image(content: bytes, form: str, pixels: PixelFormat) -> Picture:
    """The image of a record, as crops are cut from it.

    Args:
      content: the record's "image".
      form: its format, see `image_format`.
      pixels: the data set's.

    Raises:
      UnreadableImage: damaged, or not what the data set's metadata say.
    """
    try:
        if form == "picture":
            return _load(_open(content)).convert("L" if pixels.channels == 1 else "RGB")
        array_hwc = raster_formats.read_array(content)
    except MemoryError as error:
        raise UnreadableImage(f"does not fit into memory ({error})") from error
    _check_type(array_hwc, pixels)
    return array_hwc


def record_size(content: bytes, form: str) -> tuple[int, int]:
    """Rows and columns of a record's image, from its header.

    Raises:
      UnreadableImage: damaged.
    """
    if form == "picture":
        return _shown_size(_open(content), content)
    return raster_formats.read_header(content).size


def record_label(content: bytes) -> np.ndarray:
    """The labels (h,w) uint8 of a record's "mask", which is a PNG; 255 for void.

    Raises:
      UnreadableImage: damaged, or no labels.
    """
    try:
        image = _load(_open(content))
    except MemoryError as error:
        raise UnreadableImage(f"does not fit into memory ({error})") from error
    if image.mode not in ("L", "P"):
        raise UnreadableImage(f"a mask of PIL mode {image.mode}, not of labels")
    return np.asarray(image)


def as_array(picture: Picture) -> np.ndarray:
    """The values (h,w,c) of a picture."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def unpack(content: bytes, channels: int) -> bytes:
    """An 8-bit image -> the same as uncompressed BMP; raises as `decode_image`."""
    stream = io.BytesIO()
    decode_image(content, channels).save(stream, "BMP")
    return stream.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """(h,w), (h,w,1) or (h,w,3) uint8 -> PNG, written quickly rather than small."""
    stream = io.BytesIO()
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
