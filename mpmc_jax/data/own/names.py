"""Finds class names that a user's folder lists in a file of another program.

Lines hold a name, and perhaps a value or a color, in any order and with any of the
separators , ; : and tab; or a name alone (see `Known.numbered`):

    classes.txt, labels.txt          one name per line
    class_dict.csv                   road,128,64,128
    label_colors.txt                 128 64 128   road
    labelmap.txt (CVAT)              road:128,64,128::
    _classes.csv (Roboflow)          1, road
    dataset.json (nnU-Net)           "labels": {"road": 1} or {"1": "road"}
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

from mpmc_jax.data import files, lists
from mpmc_jax.data.builders import camvid, cityscapes
from mpmc_jax.data.decode import Color
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

_FILES = re.compile(
    r"_?(class(es)?|labels?|label_?map|class_?(dict|names)|(label_)?colors|colormap|"
    r"codes)(_\w+)?\.(txt|csv)",
    re.IGNORECASE,
)
_NNUNET = "dataset.json"
_BLACK = (0, 0, 0)
# So few colors may agree by chance.
_FEW = 2
_BACKGROUND = ("background", "_background_", "bg")
_VOID = ("void", "ignore", "unlabeled", "unlabelled", "unknown", "undefined")


@dataclasses.dataclass(frozen=True)
class Known:
    """Class names that a file lists.

    Attributes:
      path: the file; None if there is none.
      values: value -> name; empty where colors are listed.
      colors: color -> name.
      void: values that are not classes.
      order: names without values or colors.
    """

    path: pathlib.Path | None = None
    values: dict[int, str] = dataclasses.field(default_factory=dict)
    colors: dict[Color, str] = dataclasses.field(default_factory=dict)
    void: tuple[int, ...] = ()
    order: tuple[str, ...] = ()

    def numbered(self, values: Iterable[int], remarks: list[str]) -> "Known":
        """Gives names that are only listed to the values that occur in masks.

        They count from 0, or from 1 if they are one fewer than the values from 0 to
        the largest one: then 0 is the background. A list of another length says
        nothing. Values whose names say that they are no classes are void.

        Args:
          values: values of masks, without 255.
          remarks: gets a warning if the list is not used.
        """
        held, named = {*values}, dict(self.values)
        if self.order and held:
            last, count = max(held), len(self.order)
            from_0 = self.order[0].lower() in (*_BACKGROUND, *_VOID)
            if count > last and (from_0 or 0 in held):
                named = dict(enumerate(self.order))
            elif count == last and not from_0:
                named = {0: _made_up(0)} if 0 in held else {}
                named |= dict(enumerate(self.order, 1))
            else:
                remarks.append(
                    f"warning: {self.path} lists {quantity(count, 'name')}, and masks "
                    f"hold the values {shorten(sorted(held), 12)}, so it is not used; "
                    "name the classes in classes.json"
                )
        void = [value for value, name in named.items() if name.lower() in _VOID]
        named = {value: name for value, name in named.items() if value not in void}
        return dataclasses.replace(
            self, values=named, void=(*self.void, *void), order=()
        )

    @property
    def count(self) -> int:
        """The number of values from 0 that have names."""
        return next(i for i in range(len(self.values) + 1) if i not in self.values)

    def covers(self, last: int) -> bool:
        """Returns whether all values from 0 to `last` have names."""
        return last < self.count

    def of_values(self, values: list[int]) -> list[str]:
        """Returns the names of class values, made up where none is listed."""
        return _distinct([self.values.get(v, _made_up(v)) for v in values])

    def of_colors(self, colors: list[Color], indices: Mapping[Color, int]) -> list[str]:
        """Returns the names of class colors, made up where none is listed.

        Args:
          colors: the classes' colors.
          indices: color -> index in the palettes; empty if these do not agree.
        """
        if self.values and indices.keys() >= {*colors}:
            return self.of_values([indices[color] for color in colors])
        made_up = [
            "background" if color == (0, 0, 0) else f"class_{i}"
            for i, color in enumerate(colors)
        ]
        return _distinct(
            [
                self.colors.get(color, name)
                for color, name in zip(colors, made_up, strict=True)
            ]
        )

    def two(self) -> list[str]:
        """Returns the names of background and foreground."""
        if self.values.keys() in ({0, 1}, {0, IGNORE_LABEL}):
            return [name for _, name in sorted(self.values.items())]
        return ["background", "foreground"]

    def gave(self, class_names: Iterable[str]) -> bool:
        """Returns whether a class name is listed that would not have been made up."""
        listed = {*self.values.values(), *self.colors.values(), *self.order}
        return bool(listed & {*class_names} - {_made_up(v) for v in range(256)})

    def agrees(self, class_names: Iterable[str]) -> bool:
        """Returns whether classes have the names and order of this list.

        Classes that it lacks may have made-up names.
        """
        found, listed = list(class_names), iter(self.colors.values())
        if self.order:
            made_up = {_made_up(v) for v in range(256)} - {*self.order}
            found = [name for name in class_names if name not in made_up]
            listed = iter(self.order)
        elif self.values:
            made_up = {_made_up(v) for v in range(256) if v not in self.values}
            found = [name for name in class_names if name not in made_up]
            listed = iter([name for _, name in sorted(self.values.items())])
        # In order: each name is searched for after the one before it.
        return bool(found) and all(name in listed for name in found)

    def is_void(self, color: Color) -> bool:
        """Returns whether a color's name says that it is no class."""
        return self.colors.get(color, "").lower() in _VOID


def _made_up(value: int) -> str:
    return "background" if value == 0 else f"class_{value}"


def find(directory: pathlib.Path) -> Known:
    """Reads the first such file of a folder."""
    for path in files.visible(directory.iterdir()):
        listed = path.name == _NNUNET or _FILES.fullmatch(path.name)
        if listed and path.is_file():
            known = _read_nnunet(path) if path.name == _NNUNET else read(path)
            if known.values or known.colors or known.order:
                return known
    return Known()


def published(colors: Collection[Color]) -> Known:
    """Returns the names of a published data set that has all these colors.

    Black is void there.
    """
    shown = {*colors} - {_BLACK}
    for classes in (camvid.CLASSES, cityscapes.CLASSES):
        if len(shown) > _FEW and shown <= {*classes.values()}:
            named = {color: name for name, color in classes.items()}
            return Known(colors=named | {_BLACK: "void"})
    return Known()


def read(path: pathlib.Path) -> Known:
    """Reads a list of class names; lines of another form are skipped."""
    try:
        lines = lists.read_lines(path)
    except (ValueError, OSError):
        return Known()
    values: dict[int, str] = {}
    colors: dict[Color, str] = {}
    order: list[str] = []
    plain = [line.strip() for line in lines if not line.startswith("#")]
    for line in plain:
        parts = [each for part in re.split(r"[,;:\t]", line) for each in _split(part)]
        numbers = [int(part) for part in parts if part.isdecimal()]
        words = [part for part in parts if part and not part.isdecimal()]
        if not words:
            continue
        if len(numbers) >= 3 and max(numbers[-3:]) < 256:
            red, green, blue = numbers[-3:]
            colors[red, green, blue] = words[0]
        elif len(numbers) == 1:
            values[numbers[0]] = words[0]
        elif not numbers and (len(words) == 1 or "," not in line):
            order.append(words[0])
    if colors:
        return Known(path, colors=colors)
    if len({*values.values()}) < len(values) and not order:
        # The numbers belong to the names, as in "grade 1" and "grade 2".
        return Known(path, order=tuple(line for line in plain if line))
    if values:
        return Known(path, values)
    return Known(path, order=tuple(order)) if order else Known()


def _read_nnunet(path: pathlib.Path) -> Known:
    """Reads nnU-Net's description of a data set; entries of another form are skipped.

    Old versions map values to names. A label "ignore", which is the last, is void.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return Known()
    labels = facts.get("labels") if isinstance(facts, dict) else None
    values: dict[int, str] = {}
    for key, given in labels.items() if isinstance(labels, dict) else ():
        # Regions are lists of values, and overlap.
        name, value = (given, key) if key.isdecimal() else (key, given)
        if isinstance(name, str) and name.strip() and str(value).isdecimal():
            values[int(value)] = name.strip()
    last = max(values, default=-1)
    if values.get(last, "").lower() == "ignore":
        del values[last]
        return Known(path, values, void=(last,))
    return Known(path, values) if values else Known()


def _split(part: str) -> list[str]:
    """Splits the numbers at the ends of a text from its name, which may hold blanks."""
    found = re.fullmatch(r"((?:\d+\s+)*)(.*?)((?:\s+\d+)*)", part.strip())
    return [*found[1].split(), found[2].strip(), *found[3].split()] if found else []


def _distinct(found: list[str]) -> list[str]:
    """Returns names with a number added to those that occur before."""
    taken: dict[str, int] = {}
    distinct = []
    for name in found:
        taken[name] = taken.get(name, 0) + 1
        distinct.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return distinct
