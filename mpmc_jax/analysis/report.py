"""A report that compares runs: one page of HTML.

render(["runs/a", "runs/b"])
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpmc_jax import web_page
from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, SavedRun, by_name
from mpmc_jax.analysis.confusion import Confusion
from mpmc_jax.analysis.curves import Curves, choose_score, series
from mpmc_jax.analysis.examples import open_common
from mpmc_jax.analysis.figure3 import Figure3
from mpmc_jax.analysis.reliability import Reliability
from mpmc_jax.evaluation.metrics import iou
from mpmc_jax.paths import as_path
from mpmc_jax.training.workdir import flatten

# What each section shows, for those who read it first.
_ABOUT = {
    "Learning curves": "The validation score and the supervised loss over the steps.",
    "Classes": "Intersection over union (IoU) of each class on the validation images, "
    "in percent.",
    "Confusion": "Shares of each true class that were predicted as each class.",
    "Reliability": "Accuracy of pixels by their confidence; a calibrated network is on "
    "the diagonal.",
    "Images": "Validation images, their truth and the predictions; boxes where runs "
    "differ most.",
    "Settings": "Those in which the runs differ.",
}


def render(
    runs: Sequence[str | os.PathLike[str]],
    *,
    checkpoint: str = "best",
    data_dir: str = "",
    images: int = 3,
) -> str:
    """Compares runs of one data set, and returns the page.

    Args:
      runs: directories of runs.
      checkpoint: "best", "last" or a step.
      data_dir: folder of prepared data sets; "" for the runs' own.
      images: number of validation images to show; 0 for none.

    Raises:
      ValueError, OSError, WorkdirError, CheckpointError: a run that cannot be read, or
        runs of different data sets; see `load_run` and `open_common`.
    """
    saved = [SavedRun(as_path("RUN", os.fspath(r)), checkpoint, data_dir) for r in runs]
    named = by_name(saved)
    open_common(saved)  # Errors of runs and data come first.
    with style.applied():
        curves, confusion = Curves().draw(saved), Confusion().draw(saved)
        sections = {
            "Learning curves": _shown(curves, "learning curves"),
            "Classes": _classes(confusion, named),
            "Confusion": _shown(confusion, "confusion matrices"),
            "Reliability": _shown(Reliability().draw(saved), "reliability diagrams"),
        }
        if images:
            sections["Images"] = _shown(
                Figure3(images=images).draw(saved), "predictions"
            )
    if len(named) > 1:
        sections["Settings"] = _settings(named)
    body = [_overview(named)]
    for title, content in sections.items():
        body.append(f"<h2>{title}</h2>\n<p>{_ABOUT[title]}</p>\n{content}")
    body.append(f"<h2>Environment</h2>\n{_environment(named)}")
    return web_page.page(f"Runs: {', '.join(named)}", "\n".join(body))


def _shown(drawing: Drawing, what: str) -> str:
    """Makes the figure of a drawing."""
    return web_page.image(drawing.png, "png", f"{what} of the runs")


def _overview(named: Mapping[str, SavedRun]) -> str:
    """Makes the table of the runs: what they are and their scores."""
    lines = {name: run.metrics for name, run in named.items()}
    score = choose_score(lines)
    rows = []
    for name, run in named.items():
        config = run.restored.config
        points = series(lines[name], score)
        best = max(points, key=lambda point: point[1], default=(0, float("nan")))
        last = points[-1] if points else best
        rows.append(
            [
                name,
                config.method.name + (" + MPMC" if config.mpmc.enabled else ""),
                f"{config.model.name}/{config.model.backbone}",
                f"{config.data.name} {config.data.split}",
                run.restored.step,
                f"{100 * last[1]:.1f} ({last[0]})",
                f"{100 * best[1]:.1f} ({best[0]})",
            ]
        )
    header = [
        "run",
        "method",
        "network",
        "data",
        "step shown",
        f"last {score}, % (step)",
    ]
    return web_page.table([*header, "best, % (step)"], rows)


def _classes(confusion: Drawing, named: Mapping[str, SavedRun]) -> str:
    """Makes the table of IoU by class and run, from the rows of the confusion."""
    names = next(iter(named.values())).restored.facts.class_names
    scores = []
    for run in named:
        pixels = [row["pixels"] for row in confusion.rows if row["run"] == run]
        scores.append(iou(np.reshape(pixels, (len(names), len(names)))))
    rows = [
        [name, *(_percent(by_class[index]) for by_class in scores)]
        for index, name in enumerate(names)
    ]
    rows.append(["mean", *(_percent(np.nanmean(by_class)) for by_class in scores)])
    return web_page.table(["class", *named], rows)


def _percent(share: Any) -> object:
    """A share in percent, or a dash for a class without pixels."""
    return "-" if np.isnan(share) else 100 * float(share)


def _settings(named: Mapping[str, SavedRun]) -> str:
    """Makes the table of the settings that are not the same in all runs."""
    settings = [flatten(run.restored.config.to_dict()) for run in named.values()]
    rows = []
    for key in settings[0]:  # A run that is read has all keys.
        values = [str(of_run[key]) for of_run in settings]
        if len({*values}) > 1:
            rows.append([key, *values])
    if not rows:
        return "<p>All settings are the same.</p>"
    return web_page.table(["setting", *named], rows)


def _environment(named: Mapping[str, SavedRun]) -> str:
    """Makes the table of versions, device, seed, data and revision."""
    facts = []
    for run in named.values():
        manifest = run.restored.manifest
        data = manifest.get("data", {})
        facts.append(
            {
                **manifest.get("versions", {}),
                "python": manifest.get("python"),
                "device": manifest.get("device_kind"),
                "devices": manifest.get("device_count"),
                "seed": manifest.get("seed"),
                "revision": manifest.get("revision"),
                "labeled images": data.get("labeled"),
                "unlabeled images": data.get("unlabeled"),
                "fingerprint of the data": data.get("fingerprint"),
            }
        )
    keys = dict.fromkeys(key for each in facts for key in each)
    rows = [[key, *(str(each.get(key, "-")) for each in facts)] for key in keys]
    return web_page.table(["", *named], rows)
