"""What a user's classes.json says of the classes; see `folder`."""

import dataclasses
import json
import pathlib

import numpy as np

from mpmc_jax.data import images, lists
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.images import Color
from mpmc_jax.data.lists import shorten
from mpmc_jax.types import IGNORE_LABEL

_KEYS = ("classes", "palette", "void", "binary")
_FOREGROUND = 255


@dataclasses.dataclass(frozen=True)
class Classes:
    """Names and how masks show them.

    Attributes:
      names: index -> name.
      palette: index -> colour in masks, () where they hold indices.
      void: colours of void.
      binary: masks hold 0 and 255 for classes 0 and 1.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...] = ()
    void: tuple[Color, ...] = ()
    binary: bool = False

    def colors(self) -> dict[Color, int] | None:
        """Colour -> label, or None without a palette."""
        if not self.palette:
            return None
        colors = {color: i for i, color in enumerate(self.palette)}
        return colors | dict.fromkeys(self.void, IGNORE_LABEL)


def from_binary(content: bytes) -> bytes:
    """A mask of 0 and 255 -> one of classes 0 and 1, as PNG.

    Raises:
      UnreadableImage: not a mask, or one of other values.
    """
    label_hw = images.decode_mask(content)
    other = np.setdiff1d(np.unique(label_hw), [0, _FOREGROUND]).tolist()
    if other:
        raise UnreadableImage(
            f'holds {shorten(other)}; with "binary" masks hold 0 and 255 alone'
        )
    return images.encode_png((label_hw == _FOREGROUND).astype(np.uint8))


def read(path: pathlib.Path, given: tuple[str, ...], problems: list[str]) -> Classes:
    """Reads classes.json if it is there; `given` names go before its own."""
    facts: dict = {}
    if path.is_file():
        try:
            facts = json.loads(path.read_text())
        except ValueError as error:
            problems.append(f"{path}: not JSON ({error})")
            return Classes(given)
        if not isinstance(facts, dict):
            problems.append(f'{path}: not an object; write {{"classes": ["...", ...]}}')
            return Classes(given)
        unknown = sorted(set(facts) - set(_KEYS))
        if unknown:
            problems.append(
                f"{path}: unknown keys {shorten(unknown)}; valid: {shorten([*_KEYS])}"
            )
    listed = facts.get("classes", [])
    if not _is_list_of(str, listed):
        problems.append(f'{path}: "classes" is not a list of names: {listed!r}')
        listed = []
    names = given or tuple(listed)
    if not names:
        problems.append(f'{path}: no class names; write {{"classes": ["...", ...]}}')
    if len(names) > IGNORE_LABEL:
        problems.append(f"{path}: {len(names)} classes; labels are 8 bits, 255 is void")
    if len(set(names)) != len(names):
        problems.append(f"{path}: repeats {shorten(lists.repeated(list(names)))}")
    palette, void = (_colors(facts, key, path, problems) for key in ("palette", "void"))
    if palette and len(palette) != len(names):
        problems.append(f"{path}: {len(palette)} colours for {len(names)} classes")
    again = lists.repeated([*palette, *void])
    if again:
        problems.append(f"{path}: colours that mean two things: {shorten(again)}")
    binary = facts.get("binary", False)
    if not isinstance(binary, bool):
        problems.append(f'{path}: "binary" is true or false, not {binary!r}')
    elif binary and (len(names) != 2 or palette):
        problems.append(
            f'{path}: "binary" masks have two classes and no palette; here are '
            f"{len(names)} and {len(palette)} colours"
        )
    return Classes(names, palette, void, binary is True)


def _colors(
    facts: dict, key: str, path: pathlib.Path, problems: list[str]
) -> tuple[Color, ...]:
    colors = facts.get(key, [])
    if not _is_list_of(list, colors):
        problems.append(f"{path}: {key!r} is not a list of [r,g,b]: {colors!r}")
        return ()
    wrong = [
        color
        for color in colors
        if len(color) != 3
        or not all(isinstance(v, int) and 0 <= v < 256 for v in color)
    ]
    if wrong:
        problems.append(f"{path}: {key}: not 8-bit [r,g,b]: {shorten(wrong)}")
        return ()
    return tuple(tuple(color) for color in colors)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
