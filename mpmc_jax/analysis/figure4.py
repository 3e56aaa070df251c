"""Pixel accuracy against the area of instances, by pooling scale (Figure 4)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.examples import choose_classes, open_common


def measure_instances(
    label: np.ndarray, classes: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measures the instances of a class in an image.

    An instance is a connected component of the truth; pixels that touch at a corner
    alone are not connected.

    Args:
      label: (h,w) classes of the truth.
      classes: (h,w) predicted classes.
      number: the class.

    Returns:
      For each instance its area in pixels, and how many of them are predicted right.
    """
    components, count = ndimage.label(label == number)  # pyright: ignore[reportGeneralTypeIssues]
    areas, right = (
        np.bincount(components.ravel(), weights, count + 1)[1:].astype(np.int64)
        for weights in (None, (classes == number).ravel())
    )
    return areas, right


def bin_by_area(areas: np.ndarray, bins: int) -> np.ndarray:
    """Sorts instances by area into bins of about the same number of instances.

    Args:
      areas: (n,) positive.
      bins: the largest number of bins; instances of one area are in one bin.

    Returns:
      Edges of the bins; a bin holds the areas from its lower edge on, below the upper.
    """
    lower = np.sort(areas)[np.arange(bins) * len(areas) // bins]
    return np.append(np.unique(lower), areas.max() + 1)


@dataclasses.dataclass(frozen=True)
class Figure4(Figure):
    """Figure 4: pixel accuracy against the area of instances, by pooling windows.

    The runs differ in mpmc.windows. Instances are connected components of the truth.

    Attributes:
      classes: class names joined by "+", one panel each; "" for all with an instance.
      bins: bins of areas, of about the same number of instances.
    """

    classes: str = ""
    bins: int = 5

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a panel per class, a line per run."""
        if self.bins < 1:
            raise ValueError(f"bins={self.bins}: at least 1 is needed")
        named, dataset = by_name(runs), open_common(runs)
        facts = runs[0].restored.facts
        chosen = choose_classes(facts, self.classes)
        labels = {name: _describe(run) for name, run in named.items()}
        found: dict[tuple[int, str], list[Any]] = {
            (number, name): [] for number in chosen for name in named
        }
        for example in dataset:
            for name, run in named.items():
                classes = run.restored.predict(example.image)
                for number in chosen:
                    measured = measure_instances(example.label, classes, number)
                    found[number, name].append(measured)
        rows = []
        for (number, name), parts in found.items():
            areas, right = map(np.concatenate, zip(*parts, strict=True))
            if areas.size:
                label = {"class": facts.class_names[number], "run": name}
                label["windows"] = labels[name]
                rows += [label | row for row in _by_bin(areas, right, self.bins)]
        if not rows:
            raise ValueError(f"classes={self.classes}: no instance in any image")
        return drawing_of(_panels(rows), rows)


def _by_bin(areas: np.ndarray, right: np.ndarray, bins: int) -> list[dict[str, Any]]:
    """Returns the pixel accuracy of the instances in each bin of areas."""
    edges = bin_by_area(areas, bins)
    place = np.searchsorted(edges, areas, side="right") - 1
    rows = []
    for number in range(len(edges) - 1):
        inside = place == number
        rows.append(
            {
                "area_from": edges[number],
                "area_to": areas[inside].max(),
                "instances": inside.sum(),
                "pixels": areas[inside].sum(),
                "pixel_accuracy": right[inside].sum() / areas[inside].sum(),
            }
        )
    return rows


def _describe(run: SavedRun) -> str:
    """Names the pooling windows of a run's patch classifier."""
    if run.restored.probe is None:
        return "no MPMC"
    return "windows " + "+".join(map(str, run.restored.config.mpmc.windows))


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per class, a line per run."""
    classes = list(dict.fromkeys(row["class"] for row in rows))
    series = list(dict.fromkeys((row["run"], row["windows"]) for row in rows))
    canvas, axes = style.grid(len(classes), 3.7, 2.8, columns=3)
    for name, axis in zip(classes, axes, strict=True):
        own = [row for row in rows if row["class"] == name]
        for run, windows in series:
            accuracy = [row["pixel_accuracy"] for row in own if row["run"] == run]
            axis.plot(accuracy, label=f"{run} ({windows})")
        # All runs have the same instances, and so the same bins.
        bins = [row for row in own if row["run"] == series[0][0]]
        areas = [f"{row['area_from']}-{row['area_to']}" for row in bins]
        axis.set_xticks(range(len(bins)), areas, rotation=25)
        axis.set(title=name, ylim=(-0.03, 1.03))
        axis.set(xlabel="area of instances in pixels", ylabel="pixel accuracy")
    style.legend_below(canvas, axes[0])
    return canvas
