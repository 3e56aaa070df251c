"""Reads the masks of a source: files whose pixels are labels, in common conventions.

    values   a gray value, palette index or number is the class; 255 and -1 are void
    colors   the color that a viewer shows is looked up in `MaskFormat.colors`

If `MaskFormat.colors` is set (a `classes.json` that lists colors), the colors of a
palette PNG count and not its indices, which any program that optimizes PNG files may
reorder. Gray masks are then read by color if their gray colors are listed, else by
value. If it is not set, as in VOC, indices are the labels. In the labels that are
returned, void is always 255. A prepared record's mask is read by `decode.record_label`.
"""

import dataclasses

import numpy as np
from PIL import Image

from mpmc_jax.data import decode, raster_formats
from mpmc_jax.data.decode import Color
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

_FOREGROUND = 255
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # Tags of TIFF.
_WHITE_IS_ZERO = 0
# Number types that Pillow reads from a TIFF unchanged; tifffile reads the others.
_PILLOW_TYPES = ("bool", "uint8", "int16", "uint16", "int32", "float32")
# More unknown colors or values than this may be blends of classes.
_FEW_BLENDS = 2
# So few of their pixels begin a square of 2 x 2 pixels of one value.
_SOLID = 0.2
# So small a share of wrong pixels may be a slip of the brush.
_SLIP = 0.01
_BLENDED = (
    "at the borders of classes that are blends of theirs: it was drawn with "
    "anti-aliasing or resized with interpolation; export it without, and resize masks "
    "with nearest neighbor"
)
_LOSSY = ("jpeg", "tiff_jpeg", "webp")


@dataclasses.dataclass(frozen=True)
class MaskFormat:
    """How the masks of a data set show classes.

    Attributes:
      colors: color -> label (IGNORE_LABEL for void); None if values are the classes.
      void: values that are void, besides 255 and -1. The remaining values, in order,
        become classes 0, 1, ...: those after a void value move down.
      binary: whether masks hold 0 and 255 for classes 0 and 1.
      declared_in: the user's file that declares this; "" for published data sets.
    """

    colors: dict[Color, int] | None = None
    void: tuple[int, ...] = ()
    binary: bool = False
    declared_in: str = ""

    def labels(self, values: np.ndarray) -> np.ndarray:
        """Converts values of any number type to labels, uint8 of the same shape.

        Raises:
          UnreadableImage: a value is neither a possible class nor void.
        """
        if values.dtype != np.uint8:
            values = self._narrow(values)
        return self._table()[values] if self.void else values

    def value(self, label: int) -> int:
        """Returns the value that stands for a label."""
        return int(np.flatnonzero(self._table() == label)[0])

    def _table(self) -> np.ndarray:
        """Returns the label (256,) of each value."""
        void = [value for value in (*self.void, IGNORE_LABEL) if 0 <= value < 256]
        is_void = np.zeros(256, bool)
        is_void[void] = True
        return np.where(is_void, IGNORE_LABEL, np.cumsum(~is_void) - 1).astype(np.uint8)

    def _narrow(self, values: np.ndarray) -> np.ndarray:
        """Converts numbers to uint8, with void as 255."""
        void = np.isin(values, (*self.void, -1))
        right = void | ((values >= 0) & (values <= IGNORE_LABEL))
        if values.dtype.kind == "f":
            right &= void | (values == np.floor(values))
        if not right.all():
            wrong = [value.item() for value in np.unique(values[~right])]
            text = (
                f"values {shorten(wrong, 8)} are neither a class nor void (255 or -1); "
                "store class indices from 0"
            )
            if self.declared_in and wrong[0] % 1 == 0:
                text += (
                    ', or name what is void, as in "void": '
                    f"[{wrong[0]}], in {self.declared_in}"
                )
            raise UnreadableImage(text)
        return np.where(void, IGNORE_LABEL, values).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Mask:
    """The labels of one image, and how its file stores them.

    Attributes:
      label_hw: uint8, 255 for void.
      convention: "values" or "colors"; "" if both give the same labels.
      palette: (n,3) colors of the palette whose indices are the labels, if any.
      is_plain: whether the file is a PNG that stores the labels as they are.
    """

    label_hw: np.ndarray
    convention: str = "values"
    palette: np.ndarray | None = None
    is_plain: bool = False

    def without(self, missing_hwc: np.ndarray | None) -> "Mask":
        """Returns the mask with void where all channels of its image are missing.

        Args:
          missing_hwc: which values of the image are missing, see `PixelFormat.missing`.
            If it has another size than the mask, nothing changes.
        """
        if missing_hwc is None or missing_hwc.shape[:2] != self.label_hw.shape:
            return self
        gone_hw = missing_hwc.all(axis=-1)
        if not gone_hw.any():
            return self
        label_hw = np.where(gone_hw, np.uint8(IGNORE_LABEL), self.label_hw)
        return dataclasses.replace(self, label_hw=label_hw, is_plain=False)


def decode_mask(content: bytes) -> np.ndarray:
    """Reads labels (h,w) uint8 from a mask whose values are the classes.

    Raises:
      UnreadableImage: see `read_mask`.
    """
    return read_mask(content, MaskFormat()).label_hw


def read_mask(content: bytes, form: MaskFormat) -> Mask:
    """Reads the labels of a mask file.

    Raises:
      UnreadableImage: not an image; undeclared colors or values; lossy compression
        (JPEG); transparency that tells pixels of one color apart.
    """
    try:
        if needs_tifffile(content):
            values_hwc = raster_formats.read_values(content)
            if values_hwc.shape[-1] != 1:
                raise UnreadableImage(
                    f"{values_hwc.shape[-1]} channels of {values_hwc.dtype.name}; "
                    "masks have one number per pixel, or an 8-bit color"
                )
            return _from_numbers(values_hwc[..., 0], form)
        image, opened = decode.open_oriented(content)
        refuse_lossy(content, opened)
        if image.mode == "P":
            mask = _from_palette(image, form)
        elif image.mode in ("1", "L"):
            mask = _from_gray(image, gray_bits(content, opened), form)
        elif image.mode[0] in "IF":
            mask = _from_numbers(np.asarray(image), form)
        else:
            mask = _from_color(image, form)
    except MemoryError as error:
        raise UnreadableImage(f"does not fit into memory ({error})") from error
    # A record's mask is read without a `MaskFormat`.
    plain = mask.is_plain and opened.format == "PNG" and image is opened
    return dataclasses.replace(mask, is_plain=plain)


def needs_tifffile(content: bytes) -> bool:
    """Returns whether a file holds numbers that Pillow would not read unchanged."""
    if raster_formats.is_array(content):
        return True
    return (
        raster_formats.is_tiff(content)
        and raster_formats.type_of_tiff(content) not in _PILLOW_TYPES
    )


def refuse_lossy(content: bytes, image: Image.Image) -> None:
    """Raises UnreadableImage if a mask was compressed with loss."""
    lossy = image.format in ("JPEG", "MPO")
    lossy |= image.format == "WEBP" and b"VP8L" not in content
    lossy |= image.format == "TIFF" and image.info.get("compression") in _LOSSY
    if lossy:
        raise UnreadableImage(
            f"lossy compression ({image.format}) changes labels; store masks as PNG"
        )


def gray_bits(content: bytes, image: Image.Image) -> int:
    """Returns the bits per gray value; Pillow scales fewer than 8 up to 0..255."""
    tags = getattr(image, "tag_v2", {})
    # This concerns 1 bit too: tifffile stores bool so, and Pillow inverts it.
    if image.format == "TIFF" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise UnreadableImage(
            "a TIFF in which 0 is white, so that stored and shown values differ; store "
            "masks as PNG"
        )
    if image.mode == "1":
        return 1
    if image.format == "PNG":
        return content[24]
    bits = tags.get(_BITS_PER_SAMPLE, (8,))
    return bits[0] if isinstance(bits, tuple) else bits


def _from_numbers(values_hw: np.ndarray, form: MaskFormat) -> Mask:
    if not form.binary:
        return Mask(form.labels(values_hw))
    _check_binary(values_hw)
    return Mask((values_hw == _FOREGROUND).astype(np.uint8))


def _from_gray(image: Image.Image, bits: int, form: MaskFormat) -> Mask:
    values_hw = np.asarray(image, np.uint8)
    step = 255 // (2**bits - 1)
    if 1 < bits < 8:
        values_hw = values_hw // step
    return _from_bytes(values_hw, step, form, is_plain=bits == 8)


def _from_bytes(
    values_hw: np.ndarray, step: int, form: MaskFormat, *, is_plain: bool = False
) -> Mask:
    """Reads gray values as they are stored; a viewer shows them times `step`."""
    if form.binary:
        shown_hw = values_hw * np.uint8(step)
        _check_binary(shown_hw)
        return Mask((shown_hw == _FOREGROUND).astype(np.uint8))
    label_hw = form.labels(values_hw)
    if form.colors is None:
        return Mask(label_hw, is_plain=is_plain and not form.void)
    used = _used(values_hw)
    by_color = [form.colors.get((v * step,) * 3) for v in used.tolist()]
    by_value = form.labels(used).tolist()
    if by_color == by_value:
        return Mask(label_hw, "")
    named = [label for label in by_color if label is not None]
    if len(named) < used.size:
        return Mask(label_hw)
    return Mask(_replaced(values_hw, used, named), "colors")


def _check_binary(shown_hw: np.ndarray) -> None:
    other = np.setdiff1d(np.unique(shown_hw), [0, _FOREGROUND]).tolist()
    between_hw = (shown_hw != 0) & (shown_hw != _FOREGROUND)
    if len(other) > _FEW_BLENDS and only_at_borders(shown_hw, between_hw):
        raise UnreadableImage(f"holds {quantity(len(other), 'value')} {_BLENDED}")
    if other:
        raise UnreadableImage(
            f"holds {shorten(other)}; {repaint(between_hw)}"
            'with "binary" masks hold only 0 and 255: store 255 for class 1, or remove '
            '"binary" if all masks hold 0 and 1'
        )


def _from_palette(image: Image.Image, form: MaskFormat) -> Mask:
    index_hw = np.asarray(image)
    palette = np.reshape(image.getpalette("RGB") or (), (-1, 3)).astype(np.uint8)
    if form.colors is None and not form.binary:
        label_hw = form.labels(index_hw)
        return Mask(label_hw, palette=palette, is_plain=not form.void)
    used = _used(index_hw)
    shown = np.zeros((256, 3), np.uint8)  # Indices beyond the palette are black.
    shown[: len(palette)] = palette
    is_ramp = (shown[used] == used[:, None]).all()
    if form.binary and not is_ramp:
        return _from_two_colors(index_hw, used, shown)
    if is_ramp or form.colors is None:
        return _from_bytes(index_hw, 1, form)
    colors = [tuple(color) for color in shown[used].tolist()]
    by_color = [form.colors.get(color) for color in colors]
    by_index = form.labels(used).tolist()
    # Indices are the classes, and 255 is void with a color that is not listed.
    if all(
        color == index or (color is None and index == IGNORE_LABEL)
        for color, index in zip(by_color, by_index, strict=True)
    ):
        return Mask(form.labels(index_hw), "")
    unknown = [c for c, label in zip(colors, by_color, strict=True) if label is None]
    if unknown:
        without = [label is None for label in by_color]
        told = _unknown(unknown, np.isin(index_hw, used[without]))
        raise UnreadableImage(
            f"{told}; or remove the palette from {form.declared_in} if the "
            "indices of palette PNGs are the classes"
        )
    named = [label for label in by_color if label is not None]
    return Mask(_replaced(index_hw, used, named), "colors")


def _from_two_colors(index_hw: np.ndarray, used: np.ndarray, shown: np.ndarray) -> Mask:
    """Reads a "binary" palette mask: black and white, or the indices 0 and 255."""
    gray = shown[:, 0]
    black_or_white = (shown[used] == gray[used, None]).all() and np.isin(
        gray[used], (0, _FOREGROUND)
    ).all()
    shown_hw = gray[index_hw] if black_or_white else index_hw
    _check_binary(shown_hw)
    return Mask((shown_hw == _FOREGROUND).astype(np.uint8))


def _from_color(image: Image.Image, form: MaskFormat) -> Mask:
    """Reads a mask of three channels, or of one or three with transparency."""
    if image.has_transparency_data:
        _check_alpha(np.asarray(image.convert("RGBA")))
    rgb_hwc = np.asarray(image.convert("RGB"))
    red_hw = rgb_hwc[..., 0]
    is_gray = (rgb_hwc == red_hw[..., None]).all()
    if form.colors is None or form.binary:
        if not is_gray:
            raise UnreadableImage(
                f"a color mask (PIL mode {image.mode}), and no palette says which "
                "class a color is; give the palette, or store class indices (if a "
                "palette PNG was converted to RGB, use the original file)"
            )
        return _from_bytes(red_hw, 1, form)
    if is_gray:
        return _from_bytes(red_hw, 1, form)
    return Mask(_look_up(rgb_hwc, form.colors), "colors")


def _check_alpha(rgba_hwc: np.ndarray) -> None:
    """Raises UnreadableImage if pixels of one color differ in their transparency."""
    if (rgba_hwc[..., 3] == rgba_hwc[0, 0, 3]).all():
        return
    packed = _pack(rgba_hwc).ravel()
    with_alpha = packed << 8 | rgba_hwc[..., 3].ravel()
    if np.unique(with_alpha).size > np.unique(packed).size:
        raise UnreadableImage(
            "pixels of the same color differ in transparency, and masks are read "
            "without it; store the mask without an alpha channel"
        )


def _look_up(rgb_hwc: np.ndarray, colors: dict[Color, int]) -> np.ndarray:
    packed_hw = _pack(rgb_hwc)
    label_hw = np.zeros(packed_hw.shape, np.uint8)
    known_hw = np.zeros(packed_hw.shape, bool)
    for (red, green, blue), label in colors.items():
        here_hw = packed_hw == (red << 16 | green << 8 | blue)
        label_hw[here_hw] = label
        known_hw |= here_hw
    if not known_hw.all():
        unknown = [*map(tuple, np.unique(rgb_hwc[~known_hw], axis=0).tolist())]
        text = _unknown(unknown, ~known_hw)
        if len(unknown) > IGNORE_LABEL and not 2 * known_hw.sum() > known_hw.size:
            text = f"holds {quantity(len(unknown), 'color')}; is it a photo, no mask?"
        elif len(unknown) > _FEW_BLENDS and only_at_borders(packed_hw, ~known_hw):
            text = f"holds {quantity(len(unknown), 'color')} {_BLENDED}"
        raise UnreadableImage(text)
    return label_hw


def only_at_borders(values_hw: np.ndarray, where_hw: np.ndarray) -> bool:
    """Returns whether few of these pixels have the value of a square around them."""
    solid_hw = squares(values_hw) & where_hw[:-1, :-1]
    return solid_hw.sum() < _SOLID * where_hw.sum()


def squares(values_hw: np.ndarray) -> np.ndarray:
    """Returns where a square of 2 x 2 pixels with one value begins: (h-1,w-1)."""
    first = values_hw[:-1, :-1]
    same = (first == values_hw[1:, 1:]) & (first == values_hw[1:, :-1])
    return same & (first == values_hw[:-1, 1:])


def _pack(rgb_hwc: np.ndarray) -> np.ndarray:
    return rgb_hwc[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _unknown(colors: list[Color], unknown_hw: np.ndarray) -> str:
    return (
        f"holds {quantity(len(colors), 'color')} that the palette lacks: "
        f"{shorten(colors)}; {repaint(unknown_hw)}"
        "add them to the palette, or list them under void"
    )


def repaint(wrong_hw: np.ndarray) -> str:
    """Returns the advice to repaint wrong pixels and where; "" where these are many.

    Other advice can follow, whether a sentence or a question.
    """
    if wrong_hw.mean() > _SLIP:
        return ""
    row, column = np.argwhere(wrong_hw)[0].tolist()
    where = f"in row {row} and column {column} (from 0)"
    count = int(wrong_hw.sum())
    if count == 1:
        return f"if this pixel, {where}, is a slip, repaint it; otherwise: "
    some = f"these {count} pixels, the first {where}, are a slip"
    return f"if {some}, repaint them; otherwise: "


def _replaced(values_hw: np.ndarray, used: np.ndarray, labels: list[int]) -> np.ndarray:
    """Replaces the i-th used value by the i-th label."""
    table = np.zeros(256, np.uint8)
    table[used] = labels
    return table[values_hw]


def _used(values_hw: np.ndarray) -> np.ndarray:
    """Returns the values that occur, in order."""
    return np.flatnonzero(np.bincount(values_hw.ravel(), minlength=256)).astype(
        np.uint8
    )
