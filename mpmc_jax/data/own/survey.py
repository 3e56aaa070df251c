"""Proposes classes.json from the masks of a folder.

Values or colors that fill a square of 2 x 2 pixels somewhere are classes; all others
are taken for blends of classes at their borders, which `check` reports.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpmc_jax.data import decode, masks, parallel_map, raster_formats
from mpmc_jax.data.decode import Color
from mpmc_jax.data.own import names
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

# More classes than labels of 8 bits can have.
_MOST_CLASSES = IGNORE_LABEL
# So many values in no square are still classes, such as lines of one pixel.
_FEW = 2
# A class that one mask alone holds, in a smaller share of its pixels, may be a slip.
_SLIP = 0.05
# Where this part of the masks holds 0 and 255 alone, other values are mistakes.
_MOST = 0.8


_KINDS = {
    "values": "of gray values",
    "palette": "with a palette",
    "colors": "in color",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The values or colors of one mask file.

    Attributes:
      kind: "values", "palette" (indices, with their colors), or "colors".
      counts: value or color -> pixels.
      solid: the values or colors that fill a square of 2 x 2 pixels.
      palette: index -> color, for "palette".
    """

    kind: str
    counts: dict[Any, int]
    solid: frozenset
    palette: dict[int, Color] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A proposed classes.json.

    Attributes:
      facts: its contents.
      remarks: what was found, one line each.
      warnings: what may be a mistake in a mask, one line each.
      named_in: the list beside the images that gave names to classes, if any.
    """

    facts: dict[str, Any]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    named_in: pathlib.Path | None = None


def propose(
    directory: pathlib.Path,
    found: Mapping[str, pathlib.Path],
    *,
    use_lists: bool = True,
) -> Proposal:
    """Proposes classes.json from all masks and a list of class names beside them.

    Args:
      directory: the user's folder, where such a list may be.
      found: id -> mask.
      use_lists: whether names are taken from such a list.

    Raises:
      ValueError: no mask can be read, or they do not agree; the message says why.
    """
    paths = list(found.values())
    outcomes = parallel_map.map_with_progress(_try, paths, "reading masks")
    stored: dict[pathlib.Path, Stored] = {}
    errors: list[str] = []
    for path, outcome in zip(paths, outcomes, strict=True):
        if isinstance(outcome, Stored):
            stored[path] = outcome
        else:
            errors.append(f"{path}: {outcome}")
    if not stored:
        first = errors[0] if errors else f"{directory} holds no mask"
        raise ValueError(f"no classes can be proposed: {first}")
    known = names.find(directory) if use_lists else names.Known()
    kinds = collections.Counter(each.kind for each in stored.values())
    remarks = [f"{quantity(kinds[kind], 'mask')} {_KINDS[kind]}" for kind in kinds]
    if errors:
        count = quantity(len(errors), "mask")
        remarks.append(f"{count} not read: {shorten(errors, 1)}")
    colors = _palette_colors([*stored.values()]) if kinds["palette"] else None
    warnings: list[str] = []
    if kinds["colors"] or colors is not None:
        facts = _from_colors(stored, colors or {}, known, remarks, warnings)
    else:
        facts = _from_values(stored, known, remarks, warnings)
    count = len(facts["classes"])
    if not 2 <= count <= _MOST_CLASSES:
        raise ValueError(
            f"{directory}: the masks hold {quantity(count, 'class')} "
            f"({shorten(facts['classes'])}), and 2 to {_MOST_CLASSES} are possible; "
            "if they show instances or pictures, store class indices instead"
        )
    named_in = known.path if known.gave(facts["classes"]) else None
    return Proposal(facts, tuple(remarks), tuple(warnings), named_in)


def _try(path: pathlib.Path) -> Stored | str:
    try:
        return look(path.read_bytes())
    except (UnreadableImage, OSError) as error:
        return str(error)


def look(content: bytes) -> Stored:
    """Reads which values or colors a mask file holds.

    Raises:
      UnreadableImage: not a mask; see `masks.read_mask`.
    """
    if masks.needs_tifffile(content):
        values_hwc = raster_formats.read_values(content)
        if values_hwc.shape[-1] != 1:
            raise UnreadableImage(f"{values_hwc.shape[-1]} channels")
        return _of_values(values_hwc[..., 0])
    image, opened = decode.open_oriented(content)
    masks.refuse_lossy(content, opened)
    if image.mode[0] in "IF":
        return _of_values(np.asarray(image))
    if image.mode in ("1", "L"):
        values_hw = np.asarray(image, np.uint8)
        bits = masks.gray_bits(content, opened)
        if 1 < bits < 8:
            values_hw = values_hw // (255 // (2**bits - 1))
        return _of_values(values_hw)
    if image.mode == "P":
        table = np.reshape(image.getpalette("RGB") or (), (-1, 3))
        found = _of_values(np.asarray(image))
        palette = {
            index: tuple(table[index].tolist()) if index < len(table) else (0, 0, 0)
            for index in found.counts
        }
        if all(color == (index,) * 3 for index, color in palette.items()):
            return found
        return dataclasses.replace(found, kind="palette", palette=palette)
    rgb_hwc = np.asarray(image.convert("RGB"))
    if (rgb_hwc == rgb_hwc[..., :1]).all():
        return _of_values(rgb_hwc[..., 0])
    packed_hw = rgb_hwc.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    found = _of_values(packed_hw)
    return Stored(
        "colors",
        {_unpack(value): count for value, count in found.counts.items()},
        frozenset(map(_unpack, found.solid)),
    )


def _unpack(value: int) -> Color:
    return value >> 16, value >> 8 & 255, value & 255


def _of_values(values_hw: np.ndarray) -> Stored:
    values, counts = np.unique(values_hw, return_counts=True)
    solid = np.unique(values_hw[:-1, :-1][masks.squares(values_hw)])
    return Stored(
        "values",
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
        frozenset(solid.tolist()),
    )


def _classes(stored: list[Stored]) -> list:
    """Returns the values or colors that are classes, in order."""
    every = {value for each in stored for value in each.counts}
    solid = {value for each in stored for value in each.solid}
    return sorted(every if len(every - solid) <= _FEW else solid)


def _palette_colors(stored: list[Stored]) -> dict[int, Color] | None:
    """Returns index -> color if one color stands for each index and vice versa.

    It is empty if palettes disagree, so that colors are the classes and indices mean
    nothing; None if two indices have the same color, so that indices are the classes.
    """
    by_index: dict[int, Color] = {}
    agree = True
    for each in stored:
        if len(set(each.palette.values())) < len(each.palette):
            return None
        for index, color in each.palette.items():
            agree &= by_index.setdefault(index, color) == color
    if agree and len(set(by_index.values())) == len(by_index):
        return by_index
    return {}


def _warn_of_lone(
    stored: Mapping[pathlib.Path, Stored],
    classes: list,
    warnings: list[str],
    largest: float = 1,
) -> None:
    """Adds a warning of classes that a single mask of several holds.

    Args:
      stored: the masks.
      classes: the values or colors that are classes.
      warnings: gets the warning.
      largest: the share of that mask above which a class raises none.
    """
    lone = []
    for each in classes:
        holders = [path for path, mask in stored.items() if each in mask.counts]
        counts = stored[holders[0]].counts if len(holders) == 1 else {}
        if counts and counts[each] <= largest * sum(counts.values()):
            lone.append(f"{each} ({holders[0]}, {quantity(counts[each], 'pixel')})")
    if lone and len(stored) > 1:
        warnings.append(f"only one mask holds {shorten(lone, 3)}")


def _mostly_binary(stored: Mapping[pathlib.Path, Stored]) -> bool:
    """Returns whether nearly all masks hold 0 and 255 alone."""
    held = [mask.counts.keys() for mask in stored.values()]
    binary = sum(keys <= {0, IGNORE_LABEL} for keys in held)
    return binary >= _MOST * len(held) and any(IGNORE_LABEL in keys for keys in held)


def _from_values(
    stored: Mapping[pathlib.Path, Stored],
    known: names.Known,
    remarks: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """Proposes classes of masks whose values are the classes."""
    values = _classes([*stored.values()])
    held = [value for value in values if value not in (IGNORE_LABEL, -1)]
    classes = [value for value in held if value not in known.void]
    counted = classes in ([*range(len(classes))], [*range(1, len(classes) + 1)])
    if set(values) == {0, IGNORE_LABEL} or not counted and _mostly_binary(stored):
        remarks.append("0 and 255 are two classes")
        known = known.numbered((0, 1), remarks)
        return {"classes": known.two(), "binary": True}
    known = known.numbered(held, remarks)
    void = [value for value in known.void if value in values]
    classes = [value for value in held if value not in void]
    if any(value % 1 or not 0 <= value < 256 for value in classes):
        raise ValueError(
            f"masks hold the values {shorten(classes, 8)}, and classes are whole "
            "numbers from 0 to 254: write class indices, with 255 for void"
        )
    remarks += [
        f"{value} is void" for value in (*void, IGNORE_LABEL) if value in values
    ]
    if classes and classes == list(range(1, len(classes) + 1)):
        if 0 not in void:
            remarks.append("no mask holds 0, which is void; classes count from 1")
            void = [0, *void]
        _warn_of_lone(stored, classes, warnings, _SLIP)
        return {"classes": known.of_values(classes), "void": void}
    declared = {"void": void} if void else {}
    last = classes[-1] if classes else 0
    if known.covers(last) or classes == list(range(len(classes))):
        _warn_of_lone(stored, classes, warnings, _SLIP)
        every = list(range(max(last + 1, known.count)))
        made_up = classes == [0, 1] and not known.values
        listed = known.two() if made_up else known.of_values(every)
        return {"classes": listed} | declared
    remarks.append(f"the values have gaps and are read as gray: {shorten(classes, 12)}")
    _warn_of_lone(stored, classes, warnings)
    facts = {
        "classes": known.of_values(classes),
        "palette": [[value] * 3 for value in classes],
    }
    void += [IGNORE_LABEL] * (IGNORE_LABEL in values)
    return facts | ({"void": [[value] * 3 for value in void]} if void else {})


def _from_colors(
    stored: Mapping[pathlib.Path, Stored],
    indexed: dict[int, Color],
    known: names.Known,
    remarks: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """Proposes classes of masks whose colors are the classes."""
    shown = {path: _as_colors(each) for path, each in stored.items()}
    colors = _classes([*shown.values()])
    if known.path is None:
        known = names.published(colors)
        if known.colors:
            remarks.append("the colors are those of a published data set")
    if indexed:
        held = [index for index in indexed if index != IGNORE_LABEL]
        known = known.numbered(held, remarks)
    void = [color for color in colors if known.is_void(color)]
    of_void = (indexed.get(index) for index in (*known.void, IGNORE_LABEL))
    void += [color for color in of_void if color in colors and color not in void]
    classes = [color for color in colors if color not in void]
    indices = {color: index for index, color in indexed.items()}
    classes.sort(key=lambda color: (indices.get(color, 256), color))
    known_order = {color: i for i, color in enumerate(known.colors)}
    classes.sort(key=lambda color: known_order.get(color, len(known_order)))
    remarks.append(f"{quantity(len(classes), 'color')} are classes")
    if void:
        remarks.append(f"void: {shorten(void)}")
    _warn_of_lone(shown, classes, warnings)
    if (known.values or known.order) and not indices.keys() >= {*classes}:
        remarks.append(
            f"warning: {known.path} says no colors, and the masks are colors, so its "
            "names are not used; name the classes in classes.json"
        )
    facts: dict[str, Any] = {
        "classes": known.of_colors(classes, indices),
        "palette": [list(color) for color in classes],
    }
    return facts | ({"void": [list(color) for color in void]} if void else {})


def _as_colors(stored: Stored) -> Stored:
    """Returns a mask as its colors; gray values are gray colors."""
    if stored.kind == "colors":
        return stored

    def color(value: int) -> Color:
        return stored.palette.get(value, (value, value, value))

    counts = {color(value): count for value, count in stored.counts.items()}
    return Stored("colors", counts, frozenset(map(color, stored.solid)))
