"""The figures by name, and how one is made from saved runs.

paths = make("curves", ["runs/a", "runs/b"], "results/mine")
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpmc_jax.analysis import (
    base,
    confusion,
    curves,
    evidence0,
    figure1,
    figure3,
    figure4,
    figure5,
    panels,
    pseudo_labels,
    reliability,
    style,
    supp_figure1,
    table4,
)
from mpmc_jax.paths import as_path

FIGURES: dict[str, type[base.Figure]] = {
    "curves": curves.Curves,
    "panels": panels.Panels,
    "figure1": figure1.Figure1,
    "figure3": figure3.Figure3,
    "figure4": figure4.Figure4,
    "figure5": figure5.Figure5,
    "supp_figure1": supp_figure1.SuppFigure1,
    "table4": table4.Table4,
    "pseudo_labels": pseudo_labels.PseudoLabelQuality,
    "reliability": reliability.Reliability,
    "confusion": confusion.Confusion,
    "evidence0": evidence0.Evidence0,
}


def build_figure(name: str, options: Mapping[str, Any]) -> base.Figure:
    """Builds the figure `name`; options that are not given have their defaults.

    Args:
      name: a key of `FIGURES`.
      options: values, or their texts, by name.

    Raises:
      ValueError: an unknown name or option, or a value of another type; the message
        lists the valid ones.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; one of {', '.join(FIGURES)}")
    defaults = base.default_options(FIGURES[name])
    values = {}
    for key, value in options.items():
        if key not in defaults:
            valid = ", ".join(defaults) or "none"
            raise ValueError(f"figure {name} has no option {key!r}; valid: {valid}")
        kind = type(defaults[key])
        try:
            values[key] = kind(value)
        except ValueError as error:
            raise ValueError(
                f"figure {name}: {key}={value} is not of type {kind.__name__}"
            ) from error
    return FIGURES[name](**values)


def make(
    name: str,
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    checkpoint: str = "",
    data_dir: str = "",
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Draws a figure of runs; writes OUTPUT/<name>.png, .svg, .csv and what it adds.

    Args:
      name: a key of `FIGURES`.
      runs: directories of runs.
      output: the folder for the files.
      checkpoint: "best", "last" or a step; "all" for figures over training; "" for
        the figure's own choice.
      data_dir: folder of prepared data sets; "" for the runs' own.
      options: see `build_figure`; those of the figure are its fields.

    Returns:
      The paths of the files.

    Raises:
      ValueError, OSError, WorkdirError, CheckpointError: see `build_figure`,
        `Figure.draw` and `load_run`.
    """
    figure = build_figure(name, options or {})
    stem = as_path("--output", os.fspath(output)) / name
    saved = [
        base.SavedRun(
            as_path("RUN", os.fspath(run)), checkpoint or figure.checkpoint, data_dir
        )
        for run in runs
    ]
    with style.applied():
        drawing = figure.draw(saved)
    return drawing.write(stem)
