"""Checks that all masks of a data set follow the same convention.

A mask may be valid by itself and still contradict others: some hold 0 and 1 and others
0 and 255, some hold values and others colors, or a program reordered the palettes whose
indices are the classes.
"""

import dataclasses

import numpy as np

from mpmc_jax.data.decode import Color
from mpmc_jax.data.masks import Mask, MaskFormat
from mpmc_jax.data.source import Source
from mpmc_jax.types import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """What `Agreement` has to know about one mask.

    Attributes:
      name: name for messages.
      convention: see `Mask`.
      has_palette: whether the values are indices of a palette.
      indices: color -> index in the palette, for the classes that occur and whose color
        is unique in the palette.
      in_file: (256,) whether each label occurs in the mask's file.
      counts: (256,) pixels per label; pixels whose image is missing count as void.
    """

    name: str
    convention: str
    has_palette: bool
    indices: dict[Color, int]
    in_file: np.ndarray
    counts: np.ndarray


def mask_facts(
    name: str, mask: Mask, form: MaskFormat, missing_hwc: np.ndarray | None = None
) -> MaskFacts:
    """Collects the facts of a mask.

    Args:
      name: name for messages.
      mask: the mask as it was read.
      form: the format with which it was read.
      missing_hwc: see `Mask.without`.
    """
    counts = np.bincount(mask.label_hw.ravel(), minlength=256)
    in_file = counts > 0
    known = mask.without(missing_hwc)
    if known is not mask:
        counts = np.bincount(known.label_hw.ravel(), minlength=256)
    indices: dict[Color, int] = {}
    if mask.palette is not None:
        colors, again = np.unique(mask.palette, axis=0, return_counts=True)
        unique = {tuple(color) for color in colors[again == 1].tolist()}
        for label in np.flatnonzero(in_file[:IGNORE_LABEL]).tolist():
            index = form.value(label)
            color = tuple(mask.palette[index : index + 1].ravel().tolist())
            if color in unique:  # () for an index beyond the palette.
                indices[color] = index
    has_palette = mask.palette is not None
    return MaskFacts(name, mask.convention, has_palette, indices, in_file, counts)


class Agreement:
    """Collects the facts of all masks of a source and finds contradictions."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._counts = np.zeros(256, np.int64)
        # Convention -> name of the first mask that follows it.
        self._first: dict[str, str] = {}
        self._indices: dict[Color, tuple[int, str]] = {}
        self._reordered = ""
        # The first mask with only class 0 and void, the first with a class above 0, and
        # the first with such a class and void; among those that store values.
        self._only_void = self._foreground = self._both = ""

    def add(self, facts: MaskFacts) -> None:
        """Adds the facts of the next mask."""
        self._counts += facts.counts
        self._first.setdefault(facts.convention, facts.name)
        for color, index in facts.indices.items():
            other, name = self._indices.setdefault(color, (index, facts.name))
            if other != index and not self._reordered:
                self._reordered = (
                    f"{facts.name}: color {color} has index {index} in its palette, "
                    f"and {other} in that of {name}: indices cannot be the classes; "
                    'give the classes\' colors as "palette" in classes.json'
                )
        if facts.convention != "values":
            return
        void = bool(facts.in_file[IGNORE_LABEL])
        if facts.in_file[1:IGNORE_LABEL].any():
            self._foreground = self._foreground or facts.name
            if void:
                self._both = self._both or facts.name
        elif void and facts.in_file[0]:
            self._only_void = self._only_void or facts.name

    def problems(self) -> list[str]:
        """Returns one line for each contradiction between masks."""
        found = [self._reordered] if self._reordered else []
        path = self._source.masks.declared_in
        if not path:
            return found
        if {"values", "colors"} <= self._first.keys():
            found.append(
                f"{self._first['values']}: values are the classes, and in "
                f"{self._first['colors']} colors are; store all masks alike, or remove "
                f"the palette from {path} if values are the classes"
            )
        return found + self._void_problems(path)

    def _void_problems(self, path: str) -> list[str]:
        """Returns a problem if 255 may be a class, unless "void" is declared."""
        names, form = self._source.class_names, self._source.masks
        if form.binary or form.void or not self._only_void or self._both:
            return []
        if self._foreground:
            return [
                f"{self._only_void}: holds 0 and 255, but masks of other classes, such "
                f"as {self._foreground}, hold no 255: if 255 is a class here, store "
                f'its index; if it is void, write "void": [255] in {path}'
            ]
        text = f"{path}: masks hold 0 and 255 and nothing else, and 255 is void"
        if len(names) != 2:
            return [f"{text}; store class indices 0..{len(names) - 1}"]
        hint = 'write "binary": true'
        if form.colors is not None:
            hint = 'its color in "palette" is [255,255,255]'
        return [f"{text}; if it is {names[1]!r}, {hint}"]

    def warnings(self) -> list[str]:
        """Returns a line if "void" may have shifted the classes by mistake."""
        names, form = self._source.class_names, self._source.masks
        path, last = form.declared_in, len(names) - 1
        shifts = any(0 <= value <= last for value in form.void)
        if not path or not shifts or self._counts[last]:
            return []
        return [
            f"{path}: no mask holds {form.value(last)}, which is {names[last]!r}; "
            f'"void" values are not classes: if "classes" names {form.void[0]}, remove '
            "that name"
        ]
