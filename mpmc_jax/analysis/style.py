"""The look of all figures, set here alone: palette, fonts, grids of panels.

The palette is that of Okabe and Ito, "Color Universal Design" (2008), whose colors stay
apart for readers with any common color blindness.
"""

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from mpmc_jax.data.dataset import DatasetFacts

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK, YELLOW = "#56B4E9", "#D55E00", "#000000", "#F0E442"
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, BLACK, YELLOW)
GRAY = "#777777"
# What is right and what is wrong, wherever a figure tells the two apart.
RIGHT, WRONG = BLUE, VERMILION
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_SETTINGS: Any = {
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS, marker=MARKERS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.use": True,
    # Wide, for tick labels that become longer once the panels have their size.
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
_PICTURE_WIDTH = 2.9
_LEGEND_COLUMN = 1.5
# Inches that a character of a legend or title takes, and a mark before a label.
_CHARACTER, _HANDLE = 0.085, 0.6
# Lines of a legend for which a canvas has room, and inches of another.
_LEGEND_LINES, _LEGEND_LINE = 4, 0.22


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Gives everything that Matplotlib draws inside the look of this module."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def grid(
    count: int, width: float, height: float, columns: int = 4, *, sharey: bool = False
):
    """Makes panels in a grid.

    Args:
      count: the number of panels.
      width, height: size of a panel in inches.
      columns: the largest number of panels side by side.
      sharey: whether all panels have one vertical axis, labeled at the left alone.

    Returns:
      The canvas and its `count` axes, row by row.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = Canvas(figsize=(columns * width, rows * height))
    axes = canvas.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for unused in axes[count:]:
        unused.remove()
    return canvas, list(axes[:count])


def wrapped(text: str, inches: float) -> str:
    """Breaks a text, such as the name of a run, into lines of at most this width."""
    most = max(int(inches / _CHARACTER), 8)
    return "\n".join(textwrap.fill(line, most) for line in text.split("\n"))


def legend_below(canvas: Canvas, axis: Axes, **look: Any) -> None:
    """Names what a panel draws below all panels, in as many columns as fit."""
    width = canvas.get_figwidth() - _HANDLE
    handles, labels = axis.get_legend_handles_labels()
    labels = [wrapped(label, width) for label in labels]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = int(width / (longest * _CHARACTER + _HANDLE))
    columns = max(min(columns, len(labels)), 1)
    # Beyond a few lines the legend would take the room of the panels.
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    extra = max(lines - _LEGEND_LINES, 0) * _LEGEND_LINE
    canvas.set_figheight(canvas.get_figheight() + extra)
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, **look)


def over_steps(axis: Axes) -> None:
    """Makes the horizontal axis one of training steps."""
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]], captions: Sequence[str]
) -> tuple[Canvas, np.ndarray]:
    """Makes a grid of pictures, one row per example.

    Args:
      rows: pictures (h,w,1 or 3) uint8, one per caption; None leaves room for text.
      captions: what each column shows.

    Returns:
      The canvas and its axes (rows, columns); a pixel is one unit of their axes.
    """
    heights = [_height(pictures) for pictures in rows]
    size = (_PICTURE_WIDTH * len(captions), _PICTURE_WIDTH * sum(heights) + 0.8)
    canvas = Canvas(figsize=size)
    axes = canvas.subplots(
        len(rows), len(captions), squeeze=False, height_ratios=heights
    )
    for pictures, line in zip(rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.set_axis_off()
            if picture is not None:
                rgb = np.broadcast_to(picture, (*picture.shape[:2], 3))
                axis.imshow(rgb, interpolation="nearest")
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(wrapped(caption, _PICTURE_WIDTH))
    return canvas, axes


def _height(pictures: Sequence[np.ndarray | None]) -> float:
    """Returns the height of a row of pictures, in widths of a picture."""
    sizes = [picture.shape for picture in pictures if picture is not None]
    return max(shape[0] / shape[1] for shape in sizes)


def class_legend(canvas: Canvas, facts: DatasetFacts, classes: Sequence[int]) -> None:
    """Names the colors of classes below the pictures."""
    handles: list[Any] = [
        Patch(
            facecolor=f"#{bytes(facts.palette[number]).hex()}",
            edgecolor=GRAY,
            label=facts.class_names[number],
        )
        for number in classes
    ]
    columns = max(int(canvas.get_figwidth() / _LEGEND_COLUMN), 1)
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns)


def box(axis: Axes, rows: Sequence[int], columns: Sequence[int], color: str) -> None:
    """Draws the outline of pixels rows[0]:rows[1], columns[0]:columns[1].

    A black line around it keeps it visible on any picture.
    """
    corner = (columns[0] - 0.5, rows[0] - 0.5)
    width, height = columns[1] - columns[0], rows[1] - rows[0]
    for edge, line in ((BLACK, 3.4), (color, 1.8)):
        axis.add_patch(
            Rectangle(corner, width, height, fill=False, edgecolor=edge, lw=line)
        )
