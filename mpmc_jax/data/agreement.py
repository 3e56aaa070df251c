"""What all masks of a data set must agree on, found while they are checked one by one.

A mask may be right by itself and still mean something else than the others: some store
0 and 1 and others 0 and 255, some the classes' values and others their colors, or the
indices of palettes that a program reordered.
"""

import dataclasses

import numpy as np

from mpmc_jax.data.decode import Color
from mpmc_jax.data.masks import Mask, MaskFormat
from mpmc_jax.data.source import Source
from mpmc_jax.types import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """What is kept of one mask.

    Attributes:
      name: how messages call it.
      convention: see `Mask`.
      has_palette: whether the indices of a palette are the values.
      indices: color -> the palette's index, of the classes' colors that are seen and
        unique in their palette.
      in_file: (256,) whether the mask's file shows each label.
      counts: (256,) pixels of each label, those void whose image is missing.
    """

    name: str
    convention: str
    has_palette: bool
    indices: dict[Color, int]
    in_file: np.ndarray
    counts: np.ndarray


def facts_of(
    name: str, mask: Mask, form: MaskFormat, missing_hwc: np.ndarray | None = None
) -> MaskFacts:
    """The facts of a mask that was read with `form`.

    Args:
      name: how messages call it.
      mask: what its file shows.
      form: how it was read.
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
    """Collects the facts of all masks of a source, in order."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._counts = np.zeros(256, np.int64)
        # The first mask that stores values, and the first that stores colors.
        self._first: dict[str, str] = {}
        self._indices: dict[Color, tuple[int, str]] = {}
        self._reordered = ""
        # The first mask of class 0 and void alone, of a class above 0, and of that with
        # void; none whose colors say what it shows.
        self._only_void = self._foreground = self._both = ""

    def add(self, facts: MaskFacts) -> None:
        """Takes the facts of the next mask."""
        self._counts += facts.counts
        self._first.setdefault(facts.convention, facts.name)
        for color, index in facts.indices.items():
            other, name = self._indices.setdefault(color, (index, facts.name))
            if other != index and not self._reordered:
                self._reordered = (
                    f"{facts.name}: color {color} has index {index} in its palette, "
                    f"and {other} in that of {name}, so that indices are no classes; "
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
        """One line for each thing on which the masks disagree."""
        found = [self._reordered] if self._reordered else []
        path = self._source.masks.declared_in
        if not path:
            return found
        if {"values", "colors"} <= self._first.keys():
            found.append(
                f"{self._first['values']}: values are class indices, and in "
                f"{self._first['colors']} the colors of the palette count; store all "
                f"masks alike, or take the palette out of {path} if values count"
            )
        return found + self._void_problems(path)

    def _void_problems(self, path: str) -> list[str]:
        """255 that may be meant as a class; not where "void" says what is."""
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
        mend = 'write "binary": true'
        if form.colors is not None:
            mend = 'its color in "palette" is [255,255,255]'
        return [f"{text}; if it is {names[1]!r}, {mend}"]

    def warnings(self) -> list[str]:
        """One line if "void" values may have shifted the classes by mistake."""
        names, form = self._source.class_names, self._source.masks
        path, last = form.declared_in, len(names) - 1
        shifts = any(0 <= value <= last for value in form.void)
        if not path or not shifts or self._counts[last]:
            return []
        return [
            f"{path}: no mask holds {form.value(last)}, which is {names[last]!r}; "
            f'"void" values are no classes: has {form.void[0]} a name in "classes"? '
            "Take that name out"
        ]
