"""Classes of image patches: by segmentation, and by the patch classifier (Figure 1)."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, drawing_of
from mpmc_jax.analysis.examples import choose_images, join_names
from mpmc_jax.analysis.patches import PatchView, patch_function
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.evaluation.pictures import colorize, displayable
from mpmc_jax.experiments.run import open_split

CAPTIONS = ("image", "segmentation", "classes in the boxes")
_CHARACTERS = 46  # in a line of text as wide as a picture


@dataclasses.dataclass(frozen=True)
class PatchChoice:
    """A patch and the classes that are named in it.

    Attributes:
      rows, columns: its first pixel and the one after its last.
      segmentation: (C,) bool, the classes of the segmentation.
      classifier: (C,) bool, those that the patch classifier names.
      truth: (C,) bool, those of the truth.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    segmentation: np.ndarray
    classifier: np.ndarray
    truth: np.ndarray

    @property
    def unsupported(self) -> np.ndarray:
        """(C,) bool, classes that the segmentation alone names."""
        return self.segmentation & ~self.classifier

    @property
    def color(self) -> str:
        """The color of its box."""
        return style.ORANGE if self.unsupported.any() else "white"


def choose_patches(
    view: PatchView, classes: np.ndarray, count: int
) -> list[PatchChoice]:
    """Chooses patches that do not overlap.

    Those come first in which the segmentation gives most pixels a class that the patch
    classifier does not name, then those of most classes.

    Args:
      view: the image's patches.
      classes: (h,w) the segmentation, of the view's size.
      count: how many; there may be fewer.
    """
    numbers = range(view.logits.shape[-1])
    pixels = np.stack([view.count(classes == number) for number in numbers], axis=-1)
    named, predicted = pixels > 0, view.logits > 0
    unsupported = (pixels * (named & ~predicted)).sum(-1)
    order = np.lexsort((-named.sum(-1).ravel(), -unsupported.ravel()))
    chosen: list[PatchChoice] = []
    for row, column in zip(*np.unravel_index(order, unsupported.shape), strict=True):
        patch = PatchChoice(
            tuple(view.rows[row].tolist()),
            tuple(view.columns[column].tolist()),
            named[row, column],
            predicted[row, column],
            view.targets[row, column],
        )
        if len(chosen) == count:
            break
        if not any(_overlap(patch, other) for other in chosen):
            chosen.append(patch)
    return chosen


def _overlap(one: PatchChoice, other: PatchChoice) -> bool:
    """Returns whether two patches share a pixel."""
    return all(
        a[0] < b[1] and b[0] < a[1]
        for a, b in ((one.rows, other.rows), (one.columns, other.columns))
    )


@dataclasses.dataclass(frozen=True)
class Figure1(Figure):
    """Figure 1: classes of patches by the segmentation and by the patch classifier.

    A box is orange where the segmentation names a class that the patch classifier does
    not name.

    Attributes:
      images: how many images, one per row.
      ids: their ids, joined by "+"; "" for the first ones.
      patches: boxes per image.
    """

    images: int = 2
    ids: str = ""
    patches: int = 3

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws the validation images of one run."""
        if len(runs) != 1:
            raise ValueError(f"figure1 shows one run; {len(runs)} are given")
        if self.patches < 1:
            raise ValueError(f"patches={self.patches}: at least 1 is needed")
        run = runs[0].classifying
        dataset = open_split(run, "val")
        view_of = patch_function(run)
        pictures, choices, rows, present = [], [], [], set()
        for number in choose_images(dataset, self.images, self.ids):
            example = dataset[number]
            view = view_of(example)
            classes = view.resized(run.predict(example.image))
            chosen = choose_patches(view, classes, self.patches)
            image = _resized(displayable(example.image, run.facts.pixels), classes)
            pictures.append([image, colorize(classes, run.facts.palette), None])
            choices.append(chosen)
            present |= set(np.unique(classes).tolist())
            rows += _rows(example.id, chosen, run.facts)
        canvas, axes = style.picture_grid(pictures, CAPTIONS)
        for line, chosen in zip(axes, choices, strict=True):
            for number, patch in enumerate(chosen, 1):
                _mark(line[:2], number, patch)
            _describe(line[2], chosen, run.facts)
        style.class_legend(canvas, run.facts, sorted(present))
        return drawing_of(canvas, rows)


def _resized(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Resizes a picture to the size of `like`, by the nearest pixel."""
    rows, columns = (
        np.arange(side) * have // side
        for side, have in zip(like.shape, picture.shape, strict=False)
    )
    return picture[rows][:, columns]


def _mark(axes: Sequence[Axes], number: int, patch: PatchChoice) -> None:
    """Draws a numbered box on pictures."""
    for axis in axes:
        style.box(axis, patch.rows, patch.columns, patch.color)
        axis.text(
            patch.columns[0],
            patch.rows[0],
            str(number),
            fontsize=9,
            fontweight="bold",
            verticalalignment="top",
            bbox={"facecolor": patch.color, "edgecolor": style.BLACK, "pad": 1.2},
        )


def _describe(axis: Axes, chosen: Sequence[PatchChoice], facts: DatasetFacts) -> None:
    """Lists the classes of every box beside the pictures."""
    lines: list[tuple[str, str]] = []
    for number, patch in enumerate(chosen, 1):
        texts = [
            (f"{number}  segmentation: ", patch.segmentation, style.BLACK),
            ("    patch classifier: ", patch.classifier, style.BLACK),
        ]
        if patch.unsupported.any():
            text = "    segmentation alone: "
            texts.append((text, patch.unsupported, style.VERMILION))
        for text, classes, color in texts:
            named = join_names(facts, classes).replace("+", ", ") or "none"
            wrapped = textwrap.wrap(
                text + named,
                _CHARACTERS,
                subsequent_indent=" " * 6,
                drop_whitespace=False,
            )
            lines += [(line, color) for line in wrapped]
    step = 1 / max(len(lines), 12)
    for position, (line, color) in enumerate(lines):
        height = 1 - position * step
        axis.text(
            0,
            height,
            line,
            color=color,
            fontsize=8,
            verticalalignment="top",
            transform=axis.transAxes,
        )


def _rows(
    image: str, chosen: Sequence[PatchChoice], facts: DatasetFacts
) -> list[dict[str, Any]]:
    """Returns a row of the table per patch of an image."""
    return [
        {
            "image": image,
            "patch": number,
            "top": patch.rows[0],
            "bottom": patch.rows[1],
            "left": patch.columns[0],
            "right": patch.columns[1],
            "segmentation": join_names(facts, patch.segmentation),
            "patch_classifier": join_names(facts, patch.classifier),
            "truth": join_names(facts, patch.truth),
            "segmentation_alone": join_names(facts, patch.unsupported),
        }
        for number, patch in enumerate(chosen, 1)
    ]
