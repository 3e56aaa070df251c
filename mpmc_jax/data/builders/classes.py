"""Reads a user's classes.json: class names, mask format, missing data; see `folder`."""

import dataclasses
import json
import pathlib
import re

from mpmc_jax.data import lists
from mpmc_jax.data.decode import Color
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

_KEYS = ("classes", "palette", "void", "binary", "nodata")
# TensorBoard replaces these characters in tags by "_".
_NOT_IN_TAGS = re.compile(r"[^-/\w.]")


@dataclasses.dataclass(frozen=True)
class Classes:
    """The contents of classes.json.

    Attributes:
      names: index -> name.
      palette: index -> color; () if none is given.
      masks: how masks store classes.
      nodata: see `PixelFormat`; None if not given.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    masks: MaskFormat
    nodata: tuple[float | str, ...] | None = None


def read(path: pathlib.Path, given: tuple[str, ...], problems: list[str]) -> Classes:
    """Reads classes.json if it exists.

    Args:
      path: path of classes.json.
      given: class names that replace those of the file; () for none.
      problems: gets one line for each problem.
    """
    facts = _read_facts(path, problems)
    listed = facts.get("classes", [])
    if not _is_list_of(str, listed):
        problems.append(f'{path}: "classes" is not a list of names: {listed!r}')
        listed = []
    names = given or tuple(listed)
    binary = facts.get("binary", False)
    if not isinstance(binary, bool):
        problems.append(f'{path}: "binary" is true or false, not {binary!r}')
        binary = False
    colors, values = _void(facts, path, problems)
    _check_names(names, path, problems)
    _check_number(names, values, path, problems)
    palette = _colors(facts.get("palette", []), "palette", path, problems)
    if palette and len(palette) != len(names):
        problems.append(
            f"{path}: {quantity(len(palette), 'color')} for "
            f"{quantity(len(names), 'class')}"
        )
    if colors and not palette:
        problems.append(
            f'{path}: "void" names colors, but there is no "palette"; give the '
            "classes' colors too, or the values that are void, as in [0]"
        )
    again = lists.repeated([*palette, *colors])
    if again:
        problems.append(f"{path}: colors with two meanings: {shorten(again)}")
    if binary and (len(names) != 2 or palette or values):
        problems.append(
            f'{path}: "binary" masks have two classes and no palette or void values, '
            f"not {len(names)}, {len(palette)} and {len(values)}"
        )
    known = {color: i for i, color in enumerate(palette)}
    known |= dict.fromkeys(colors, IGNORE_LABEL)
    masks = MaskFormat(known if palette else None, values, binary, str(path))
    return Classes(names, palette, masks, _nodata(facts, path, problems))


def _read_facts(path: pathlib.Path, problems: list[str]) -> dict:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: not JSON ({error})")
        return {}
    if not isinstance(facts, dict):
        problems.append(f'{path}: not an object; write {{"classes": ["...", ...]}}')
        return {}
    unknown = sorted(set(facts) - set(_KEYS))
    if unknown:
        problems.append(
            f"{path}: unknown keys {shorten(unknown)}; valid: {shorten([*_KEYS])}"
        )
    return facts


def _check_names(
    names: tuple[str, ...], path: pathlib.Path, problems: list[str]
) -> None:
    if not names and not problems:
        problems.append(
            f'{path}: no class names; write {{"classes": ["...", ...]}}, or let '
            "`launch.prepare_data --init` write what the masks show"
        )
    if len(names) == 1:
        problems.append(
            f"{path}: {names[0]!r} is the only class; name the other classes too, as "
            f'in {{"classes": ["background", "{names[0]}"]}}, with "binary": true if '
            "masks hold 0 and 255"
        )
    wrong = [name for name in names if not name.isprintable() or not name.strip()]
    if wrong:
        problems.append(
            f"{path}: names that are empty or hold control characters: "
            f"{shorten([*map(repr, wrong)])}"
        )
    if len(set(names)) != len(names):
        problems.append(f"{path}: repeats {shorten(lists.repeated(list(names)))}")
    tags: dict[str, str] = {}
    for name in dict.fromkeys(names):
        tag = _NOT_IN_TAGS.sub("_", name)
        if tag in tags:
            problems.append(
                f"{path}: {tags[tag]!r} and {name!r} are both {tag!r} in TensorBoard; "
                "rename one"
            )
        tags.setdefault(tag, name)


def _check_number(
    names: tuple[str, ...], void: tuple[int, ...], path: pathlib.Path, problems: list
) -> None:
    """Adds a problem if there are more classes than 8-bit values for them."""
    most = IGNORE_LABEL - sum(0 <= value < IGNORE_LABEL for value in set(void))
    if len(names) > most:
        problems.append(
            f"{path}: {len(names)} classes, and {most} is the most: labels have 8 "
            'bits, and neither 255 nor "void" values are classes; merge classes'
        )


def _void(
    facts: dict, path: pathlib.Path, problems: list[str]
) -> tuple[tuple[Color, ...], tuple[int, ...]]:
    """Reads the colors and the values that are void."""
    listed = facts.get("void", [])
    if not isinstance(listed, list):
        problems.append(
            f'{path}: "void" is not a list of values or [r,g,b]: {listed!r}'
        )
        return (), ()
    values = [item for item in listed if _is_whole(item)]
    colors = [item for item in listed if not _is_whole(item)]
    again = lists.repeated(values)
    if again:
        problems.append(f'{path}: "void" repeats {shorten(again)}')
    return _colors(colors, "void", path, problems), tuple(values)


def _nodata(
    facts: dict, path: pathlib.Path, problems: list[str]
) -> tuple[float | str, ...] | None:
    if "nodata" not in facts:
        return None
    listed = facts["nodata"]
    listed = listed if isinstance(listed, list) else [listed]
    # JSON has no NaN, but Python reads one.
    listed = ["nan" if value != value else value for value in listed]
    wrong = [
        value
        for value in listed
        if value != "nan"
        and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    if wrong:
        problems.append(
            f'{path}: "nodata" is a list of numbers and "nan" (for all values that are '
            f"not finite), not {shorten([*map(repr, wrong)])}"
        )
        return None
    return tuple(value if value == "nan" else float(value) for value in listed)


def _colors(
    colors: object, key: str, path: pathlib.Path, problems: list[str]
) -> tuple[Color, ...]:
    if not isinstance(colors, list) or not _is_list_of(list, colors):
        kind = "values or [r,g,b]" if key == "void" else "[r,g,b]"
        problems.append(f'{path}: "{key}" is not a list of {kind}: {colors!r}')
        return ()
    wrong = [
        color
        for color in colors
        if len(color) != 3 or not all(_is_whole(v) and 0 <= v < 256 for v in color)
    ]
    if wrong:
        problems.append(f"{path}: {key}: not 8-bit [r,g,b]: {shorten(wrong)}")
        return ()
    return tuple((red, green, blue) for red, green, blue in colors)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
