"""Encoded bytes of images and masks, and the arrays that they hold.

Images of 8-bit grey or RGB are Pillow's, in any format of its; others are `deep`'s. A
record keeps the former as they came (or uncompressed), the latter as .npy.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpmc_jax.data import deep
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.lists import shorten
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

Color = tuple[int, int, int]

_GREY = ("1", "L", "LA")
_EIGHT_BITS = (*_GREY, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def open_image(content: bytes) -> Image.Image:
    """Opens encoded bytes and decodes them in full.

    Raises:
      UnreadableImage: not an image, a truncated one, or more than 8 bits a channel.
    """
    if not content:
        raise UnreadableImage("an empty file")
    if deep.is_deep_colour(content):
        raise UnreadableImage(
            "16 bits a colour in a PNG, of which Pillow keeps 8; store TIFF or .npy"
        )
    if deep.is_tiff(content) and deep.is_more_than_pillows(content):
        raise UnreadableImage(
            "a TIFF with more channels, bits or pages than 8-bit grey or RGB have"
        )
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"{error}; Pillow's pixel limit (Image.MAX_IMAGE_PIXELS) is kept, as files "
            "are not trusted: cut the image into tiles"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(
            f"truncated or damaged ({error}); copy it again"
        ) from error
    return image


def decode_image(content: bytes, channels: int) -> Image.Image:
    """Encoded bytes -> 8-bit image with 1 (mode L) or 3 (RGB) channels.

    Raises:
      UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    if image.mode[0] in "IF":
        raise UnreadableImage(
            f"more than 8 bits a channel (PIL mode {image.mode}); convert it to 8 bits"
        )
    return image.convert("L" if channels == 1 else "RGB")


def open_picture(content: bytes, pixels: PixelFormat) -> Image.Image | np.ndarray:
    """What crops are cut from: see `cropping.Picture`; raises as `decode_array`."""
    if is_bytes(pixels):
        return decode_image(content, pixels.channels)
    return decode_array(content, pixels)


def decode_array(content: bytes, pixels: PixelFormat) -> np.ndarray:
    """Encoded bytes -> (h,w,c) of the format's type, never one of another type.

    Raises:
      UnreadableImage: see `decode_image` and `deep`; another type or number of
        channels than the format's; a value that is not finite.
    """
    if _is_pillows(content, pixels):
        image = np.asarray(decode_image(content, pixels.channels))
        return image[..., None] if image.ndim == 2 else image
    if deep.is_array(content) or deep.is_tiff(content):
        array_hwc = deep.read_array(content)
    else:
        # uint16 from 16-bit grey; what is not is told by its type.
        array_hwc = np.atleast_3d(np.asarray(open_image(content)))
    found = (array_hwc.dtype.name, array_hwc.shape[-1])
    if found != (pixels.dtype, pixels.channels):
        raise UnreadableImage(
            f"{found[1]} channels of {found[0]}, but the data set has "
            f"{pixels.channels} of {pixels.dtype}; all images must agree"
        )
    deep.check_finite(array_hwc)
    return array_hwc


def _is_pillows(content: bytes, pixels: PixelFormat) -> bool:
    """Whether it is for Pillow to make 8-bit grey or RGB of an image."""
    return is_bytes(pixels) and not deep.is_array(content)


def is_bytes(pixels: PixelFormat) -> bool:
    """Whether images are 8-bit grey or RGB, as picture files are."""
    return pixels.dtype == "uint8" and pixels.channels in (1, 3)


def read_header(content: bytes) -> deep.Header:
    """Size, channels and type of an image, not decoded; RGB for all that has colour.

    Raises:
      UnreadableImage: not an image, or see `deep`.
    """
    if deep.is_array(content):
        return deep.read_header(content)
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, mode = (image.height, image.width), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # A TIFF may still be one that Pillow does not know.
        if deep.is_tiff(content):
            return deep.read_header(content)
        raise UnreadableImage(f"not an image of a known format ({error})") from error
    if deep.is_tiff(content) and (
        mode not in _EIGHT_BITS or deep.is_more_than_pillows(content)
    ):
        return deep.read_header(content)
    if mode.startswith("I;16"):
        return deep.Header(size, 1, "uint16")
    return deep.Header(size, 1 if mode in _GREY else 3, "uint8")


def decode_mask(content: bytes, colors: dict[Color, int] | None = None) -> np.ndarray:
    """Encoded bytes -> (h,w) class indices, 255 for void.

    Grey values and palette indices are taken as they are, whatever colour a palette
    gives them; masks in colour are looked up in `colors`.

    Raises:
      UnreadableImage: see `open_image`; or a colour mask whose colours are unknown.
    """
    image = open_image(content)
    if image.mode in ("L", "P"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image, np.uint8)
    if image.mode[0] == "I":
        return _narrow(np.asarray(image))
    if colors is None:
        raise UnreadableImage(
            f"a colour mask (PIL mode {image.mode}), and no palette says which class "
            "a colour is; give the palette, or store class indices (a palette PNG that "
            "was flattened has lost them: take the original file again)"
        )
    return _look_up(np.asarray(image.convert("RGB")), colors)


def _narrow(values: np.ndarray) -> np.ndarray:
    if values.max() > IGNORE_LABEL:
        raise UnreadableImage(
            f"holds label {values.max()}; labels are 8 bits, with 255 for void"
        )
    return values.astype(np.uint8)


def _look_up(rgb_hwc: np.ndarray, colors: dict[Color, int]) -> np.ndarray:
    packed_hw = rgb_hwc.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    label_hw = np.zeros(packed_hw.shape, np.uint8)
    known_hw = np.zeros(packed_hw.shape, bool)
    for (red, green, blue), label in colors.items():
        here_hw = packed_hw == (red << 16 | green << 8 | blue)
        label_hw[here_hw] = label
        known_hw |= here_hw
    if not known_hw.all():
        unknown = [tuple(map(int, c)) for c in np.unique(rgb_hwc[~known_hw], axis=0)]
        raise UnreadableImage(
            f"holds {len(unknown)} colours that the palette lacks: "
            f"{shorten(unknown)}; add them, or list them under void"
        )
    return label_hw


def encode_record(content: bytes, pixels: PixelFormat, *, unpacked: bool) -> bytes:
    """An image's file -> what a record holds of it, as the module says.

    Raises:
      UnreadableImage: see `decode_array`.
    """
    if not _is_pillows(content, pixels):
        array_hwc = decode_array(content, pixels)
        write = encode_png if is_bytes(pixels) else deep.write_array
        return write(array_hwc)
    return unpack(content, pixels.channels) if unpacked else content


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
