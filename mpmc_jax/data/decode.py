"""Decodes and encodes images: users' files in any format, and prepared records.

Pillow reads 8-bit gray and RGB, `raster_formats` everything else. A user's file is
recognized by its first bytes. A record's format is decided at preparation, see
`image_format`: pictures are kept as they are (or uncompressed), others become .npy.
Every image is turned as its EXIF orientation says, so that arrays are what a viewer
shows. The masks of a source are read by `masks`.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpmc_jax.data import raster_formats
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import first_line, quantity

Color = tuple[int, int, int]
# 8-bit gray or RGB as Pillow holds it, anything else as (h,w,c).
Decoded = Image.Image | np.ndarray

_GRAY = ("1", "L", "LA")
_EIGHT_BITS = (*_GRAY, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


# Pillow reads many more formats, and for some, such as EPS, it runs another program.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_UNKNOWN = "not a PNG, JPEG, BMP, TIFF, WebP or .npy file"
# Keys of Pillow's `info` that may hold an orientation, and the marks of such chunks in
# a PNG file. Pillow turns TIFF files itself, including the size before decoding.
_EXIF_KEYS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
_EXIF_IN_PNG = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_ORIENTATION = 274
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(content: bytes) -> Image.Image:
    """Decodes an image and turns it as its EXIF orientation says.

    Raises:
      UnreadableImage: not an image, a truncated one, or more than 8 bits per channel.
    """
    return open_oriented(content)[0]


def open_oriented(content: bytes) -> tuple[Image.Image, Image.Image]:
    """Returns the image of `open_image`, and the opened file with its format and tags.

    Raises:
      UnreadableImage: see `open_image`.
    """
    if not content:
        raise UnreadableImage("an empty file")
    if raster_formats.is_deep_color(content):
        raise UnreadableImage(
            "a PNG of 16 bits per color, of which Pillow keeps 8; store TIFF or .npy"
        )
    if raster_formats.is_tiff(content) and raster_formats.exceeds_pillow(content):
        raise UnreadableImage(
            "a TIFF with more channels, bits or pages than an 8-bit gray or RGB image"
        )
    opened = _open(content)
    return _load(opened), opened


def _load(opened: Image.Image) -> Image.Image:
    """Decodes an opened image and turns it as its EXIF orientation says.

    Raises:
      UnreadableImage: it is truncated or damaged.
    """
    try:
        opened.load()
        turn = _TRANSPOSES.get(_orientation(opened))
        return opened if turn is None else opened.transpose(turn)
    # Pillow's decoders have no common error for damaged files.
    except Exception as error:
        raise UnreadableImage(
            f"truncated or damaged ({first_line(error)}); copy it again"
        ) from error


def _open(content: bytes) -> Image.Image:
    """Opens an image and reads its header.

    Raises:
      UnreadableImage: not an image, or a too large one.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnreadableImage(_UNKNOWN) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"{error}; Pillow's pixel limit (Image.MAX_IMAGE_PIXELS) applies because "
            "files are not trusted: cut the image into tiles"
        ) from error
    except Exception as error:  # See `_load`.
        raise UnreadableImage(
            f"truncated or damaged ({first_line(error)}); copy it again"
        ) from error
    raster_formats.check_bytes((*image.size, len(image.getbands())), np.dtype(np.uint8))
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8.

    It is 1 for TIFF (see `_EXIF_KEYS`), and if EXIF is damaged, as in viewers.
    """
    if image.format == "TIFF" or not _EXIF_KEYS & image.info.keys():
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return (
        orientation
        if isinstance(orientation, int) and orientation in _TRANSPOSES
        else 1
    )


def decode_image(content: bytes, channels: int) -> Image.Image:
    """Decodes an image to 8 bits with 1 channel (mode L) or 3 (RGB).

    Raises:
      UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    if image.mode[0] in "IF":
        if raster_formats.is_tiff(content):
            # Raises if no data set can have this type of values, and names it.
            raster_formats.read_header(content)
        raise UnreadableImage(
            f"more than 8 bits per channel (PIL mode {image.mode}); convert it to 8 "
            "bits"
        )
    return image.convert("L" if channels == 1 else "RGB")


def decode_array(content: bytes, pixels: PixelFormat) -> np.ndarray:
    """Decodes an image to (h,w,c) of the data set's type, missing values filled.

    Raises:
      UnreadableImage: see `decode_stored`; a value that is not finite.
    """
    stored_hwc = decode_stored(content, pixels)
    missing_hwc = pixels.missing(stored_hwc)
    raster_formats.check_finite(stored_hwc, missing_hwc)
    return stored_hwc if missing_hwc is None else pixels.fill(stored_hwc, missing_hwc)


def decode_stored(content: bytes, pixels: PixelFormat) -> np.ndarray:
    """Decodes an image to (h,w,c) of the data set's type, as it is stored.

    Raises:
      UnreadableImage: see `decode_image` and `raster_formats`; another type or number
        of channels than the data set's; too little memory.
    """
    try:
        if _uses_pillow(content, pixels):
            return as_array(decode_image(content, pixels.channels))
        if raster_formats.is_array(content) or raster_formats.is_tiff(content):
            array_hwc = raster_formats.read_array(content)
        else:
            # 16-bit gray becomes uint16; `_check_type` refuses everything else.
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


def _uses_pillow(content: bytes, pixels: PixelFormat) -> bool:
    """Whether Pillow decodes an image to 8-bit gray or RGB."""
    return is_picture(pixels) and not raster_formats.is_array(content)


def is_picture(pixels: PixelFormat) -> bool:
    """Returns whether images are 8-bit gray or RGB, as picture files are."""
    return pixels.dtype == "uint8" and pixels.channels in (1, 3)


def read_header(content: bytes) -> raster_formats.Header:
    """Reads size, channels and type of an image without decoding it.

    An image with color has three channels here, whatever its file stores.

    Raises:
      UnreadableImage: not an image; or see `raster_formats`.
    """
    if raster_formats.is_array(content):
        return raster_formats.read_header(content)
    try:
        image = _open(content)
    except UnreadableImage:
        # Pillow does not read every TIFF.
        if raster_formats.is_tiff(content):
            return raster_formats.read_header(content)
        raise
    mode = image.mode
    size = _shown_size(image, content)
    if raster_formats.is_tiff(content) and (
        mode not in _EIGHT_BITS or raster_formats.exceeds_pillow(content)
    ):
        return raster_formats.read_header(content)
    if mode.startswith("I;16"):
        return raster_formats.Header(size, 1, "uint16")
    return raster_formats.Header(size, 1 if mode in _GRAY else 3, "uint8")


def _shown_size(opened: Image.Image, content: bytes) -> tuple[int, int]:
    """Returns rows and columns of an opened image after its EXIF orientation."""
    if opened.format == "PNG" and any(mark in content for mark in _EXIF_IN_PNG):
        _load(opened)  # EXIF may come after the pixels.
    columns, rows = opened.size
    return (columns, rows) if _orientation(opened) > 4 else (rows, columns)


def encode_record(content: bytes, pixels: PixelFormat, *, unpacked: bool) -> bytes:
    """Converts an image's file to the bytes that its record holds.

    Args:
      content: the file.
      pixels: the data set's pixel format.
      unpacked: whether pictures are stored uncompressed.

    Raises:
      UnreadableImage: see `decode_array`.
    """
    if not _uses_pillow(content, pixels) or pixels.nodata:
        array_hwc = decode_array(content, pixels)
        write = encode_png if is_picture(pixels) else raster_formats.write_array
        return write(array_hwc)
    return unpack(content, pixels.channels) if unpacked else content


def image_format(pixels: PixelFormat) -> str:
    """Returns the format in which records hold images: "picture" or "npy".

    A "picture" is a file that Pillow decodes to 8-bit gray or RGB.
    """
    return "picture" if is_picture(pixels) else "npy"


def record_image(content: bytes, form: str, pixels: PixelFormat) -> Decoded:
    """Decodes a record's image.

    Args:
      content: the record's "image".
      form: the format of the data set's records, see `image_format`.
      pixels: the data set's pixel format.

    Raises:
      UnreadableImage: damaged, or of another type than the data set's.
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
    """Reads rows and columns of a record's image from its header.

    Raises:
      UnreadableImage: the record is damaged.
    """
    if form == "picture":
        return _shown_size(_open(content), content)
    return raster_formats.read_header(content).size


def record_label(content: bytes) -> np.ndarray:
    """Decodes a record's "mask", a PNG, to labels (h,w) uint8; 255 is void.

    Raises:
      UnreadableImage: the record is damaged.
    """
    try:
        image = _load(_open(content))
    except MemoryError as error:
        raise UnreadableImage(f"does not fit into memory ({error})") from error
    if image.mode not in ("L", "P"):
        raise UnreadableImage(f"a mask of PIL mode {image.mode}, not of labels")
    return np.asarray(image)


def as_array(decoded: Decoded) -> np.ndarray:
    """Returns the values (h,w,c) of a decoded image."""
    array = np.asarray(decoded)
    return array[..., None] if array.ndim == 2 else array


def unpack(content: bytes, channels: int) -> bytes:
    """Converts an 8-bit image to uncompressed BMP; raises as `decode_image`."""
    stream = io.BytesIO()
    decode_image(content, channels).save(stream, "BMP")
    return stream.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """Encodes (h,w), (h,w,1) or (h,w,3) uint8 as PNG, quickly rather than small."""
    stream = io.BytesIO()
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
