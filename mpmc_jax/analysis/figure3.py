"""Images, truth and the predictions of several runs side by side (Figure 3)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.examples import choose_images, open_common
from mpmc_jax.evaluation.pictures import colorize, displayable
from mpmc_jax.types import IGNORE_LABEL

# Sides of a box, in the smaller side of the image.
_BOX = 0.25


def choose_boxes(differs: np.ndarray, side: int, count: int) -> list[tuple[int, int]]:
    """Chooses squares with as many differing pixels as possible, one after the other.

    Args:
      differs: (h,w) bool.
      side: of a square, in pixels; at most that of the image.
      count: how many; there are fewer where no further pixel differs.

    Returns:
      First row and column of each; no pixel counts in two squares.
    """
    left = differs.copy()
    corners = []
    for _ in range(count):
        total = np.zeros([length + 1 for length in left.shape], np.int64)
        total[1:, 1:] = left.cumsum(0, dtype=np.int64).cumsum(1)
        by_rows = total[side:] - total[:-side]
        inside = by_rows[:, side:] - by_rows[:, :-side]
        top, start = np.unravel_index(inside.argmax(), inside.shape)
        if not inside[top, start]:
            break
        left[top : top + side, start : start + side] = False
        corners.append((int(top), int(start)))
    return corners


@dataclasses.dataclass(frozen=True)
class Figure3(Figure):
    """Figure 3: images, truth and predictions of runs; boxes where they differ most.

    A white box is where most pixels are right in one run and wrong in another.

    Attributes:
      images: how many images, one per row.
      ids: their ids, joined by "+"; "" for the first ones.
      boxes: white boxes per image.
    """

    images: int = 3
    ids: str = ""
    boxes: int = 2

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws the same validation images for each of the runs."""
        named, dataset = by_name(runs), open_common(runs)
        facts = runs[0].restored.facts
        pictures, corners, rows, present = [], [], [], set()
        for number in choose_images(dataset, self.images, self.ids):
            example = dataset[number]
            found = {
                name: run.restored.predict(example.image) for name, run in named.items()
            }
            known = example.label != IGNORE_LABEL
            right = {name: classes == example.label for name, classes in found.items()}
            stacked = np.stack([*right.values()])
            differs = known & stacked.any(0) & ~stacked.all(0)
            side = max(int(_BOX * min(known.shape)), 1)
            chosen = choose_boxes(differs, side, self.boxes)
            maps = [example.label, *found.values()]
            pictures.append(
                [
                    displayable(example.image, facts.pixels),
                    *(colorize(each, facts.palette) for each in maps),
                ]
            )
            corners.append([(top, left, side) for top, left in chosen])
            present |= set(np.unique(np.stack(maps)).tolist())
            rows += _rows(example.id, right, known, corners[-1])
        captions = ("image", "truth", *named)
        canvas, axes = style.picture_grid(pictures, captions)
        for line, squares in zip(axes, corners, strict=True):
            for axis in line:
                for top, left, side in squares:
                    box = (top, top + side), (left, left + side)
                    style.box(axis, *box, color="white")
        style.class_legend(canvas, facts, sorted(present - {IGNORE_LABEL}))
        return drawing_of(canvas, rows)


def _rows(
    image: str,
    right: dict[str, np.ndarray],
    known: np.ndarray,
    squares: Sequence[tuple[int, int, int]],
) -> list[dict[str, Any]]:
    """Returns each run's pixel accuracy in the whole image (box 0) and in the boxes."""
    height, width = known.shape
    areas = [(0, height, 0, width)]
    areas += [(top, top + side, left, left + side) for top, left, side in squares]
    rows = []
    for number, (top, bottom, left, end) in enumerate(areas):
        inside = np.s_[top:bottom, left:end]
        for name, correct in right.items():
            counted = correct[inside][known[inside]]
            rows.append(
                {
                    "image": image,
                    "box": number,
                    "top": top,
                    "bottom": bottom,
                    "left": left,
                    "right": end,
                    "run": name,
                    "pixel_accuracy": counted.mean() if counted.size else None,
                }
            )
    return rows
