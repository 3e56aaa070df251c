"""Stage 0 of the evidence: what patch classifiers know about wrong pseudo-labels.

The network is that of a saved run and does not change. Patch classifiers on several of
its taps are trained on the run's labeled crops, and then weigh the pseudo-labels of
crops of its unlabeled images, whose labels training never reads.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.pseudo_label_maps import CERTAIN
from mpmc_jax.analysis.pseudo_labels import area_under_roc
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.experiments.patch_screen import Screen, open_screen, train_heads
from mpmc_jax.losses.pixel import labeled_pixels
from mpmc_jax.methods.pseudo_labels import confidence_and_label
from mpmc_jax.plugins.mpmc import MPMC, adaptive_weights
from mpmc_jax.plugins.mpmc.lambda_weights import CONFIDENCES
from mpmc_jax.text import markdown_table
from mpmc_jax.training.manifest import git_revision
from mpmc_jax.types import Array, Crops, PyTree

# Least confidences of a pseudo-label that counts.
THRESHOLDS = (0.0, 0.7, 0.95)
# Pixels per crop that are measured, drawn at random.
_DRAWN = 2048
# A geometry is worth training if its truth and its gamma reach these.
_LEAST_REMOVED, _LEAST_AREA = 0.1, 0.6


def measure(screen: Screen, heads: tuple[PyTree, ...], crops: Crops) -> dict[str, Any]:
    """Computes pseudo-labels, and what each patch classifier says about them.

    Returns:
      "known", "right" (b,h,w) bool, "confidence" (b,h,w); "heads": for each patch
      classifier "oracle" (whether the class occurs in the pixel's patch), weights
      by name, (b,h,w) each, and "hamming", the share of right decisions.
    """
    assert crops.label is not None  # `Screen.crops` reads labels.
    images = network_input(crops.image, screen.run.facts.pixels)
    scores = screen.run.module.apply(screen.run.variables, images).logits
    confidence, pseudo = confidence_and_label(scores)
    taps, found = screen.taps(images), []
    for plugin, head in zip(screen.plugins, heads, strict=True):
        logits: Any = plugin.classifier().apply(head, taps[plugin.tap], train=False)
        targets, valid = screen.truth(plugin, crops)
        certain = jnp.where(targets, CERTAIN, -CERTAIN).astype(logits.dtype)
        maps = {"oracle": _weights(certain, pseudo, "sigmoid", "none", plugin)}
        for confidence_name, scale in itertools.product(CONFIDENCES, ("none", "max")):
            name = confidence_name + ("_max" if scale == "max" else "")
            maps[name] = _weights(logits, pseudo, confidence_name, scale, plugin)
        agree = jnp.mean((logits > 0) == targets, axis=-1)
        found.append({**maps, "hamming": jnp.mean(agree, where=valid)})
    return {
        "known": labeled_pixels(crops.label, screen.run.facts.num_classes),
        "right": pseudo == crops.label,
        "confidence": confidence,
        "heads": found,
    }


def _weights(
    logits: Array, pseudo: Array, confidence: str, scale: str, plugin: MPMC
) -> Array:
    weights, _ = adaptive_weights(
        logits, pseudo, confidence=confidence, scale=scale, field=plugin.field
    )
    return weights


def draw_pixels(
    look: Callable[[Crops], dict[str, Any]], batches: Iterator[Crops], images: int
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Draws labeled pixels of `images` crops at random.

    Args:
      look: `measure` of a batch.
      batches: crops of unlabeled images, with labels.
      images: how many crops.

    Returns:
      "right" (n,) bool and "confidence" (n,) of the pixels; and for each patch
      classifier its maps at the pixels by name, and "hamming" of each batch.
    """
    pixels: dict[str, list] = {"right": [], "confidence": []}
    heads: list[dict[str, list]] = []
    seen = 0
    while seen < images:
        found = jax.device_get(look(next(batches)))
        heads = heads or [{name: [] for name in each} for each in found["heads"]]
        for i in range(min(len(found["known"]), images - seen)):
            known = np.flatnonzero(found["known"][i])
            drawn = np.random.default_rng(seen).permutation(known)[:_DRAWN]
            for name, parts in pixels.items():
                parts.append(found[name][i].ravel()[drawn])
            for parts, maps in zip(heads, found["heads"], strict=True):
                for name in parts.keys() - {"hamming"}:
                    parts[name].append(maps[name][i].ravel()[drawn])
            seen += 1
        for parts, maps in zip(heads, found["heads"], strict=True):
            parts["hamming"].append(maps["hamming"][None])
    joined = {name: np.concatenate(parts) for name, parts in pixels.items()}
    return joined, [
        {name: np.concatenate(parts) for name, parts in each.items()} for each in heads
    ]


def removed_share(right: np.ndarray, weight: np.ndarray) -> float | None:
    """Computes the share of wrong weight that weights remove.

    Weights are relative to their mean, so that a constant removes nothing. It is
    negative where wrong pixels weigh more than right ones.

    Args:
      right: (n,) bool.
      weight: (n,).

    Returns:
      The share, or None if no pixel is wrong or all weigh nothing.
    """
    mean = weight.mean(dtype=np.float64) if weight.size else 0.0
    if right.all() or mean == 0:
        return None
    return float(1 - weight[~right].mean(dtype=np.float64) / mean)


def rows_of_head(
    pixels: dict[str, np.ndarray], head: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Returns a row for each threshold and score.

    Columns: threshold; coverage and accuracy of pseudo-labels; oracle, the share of
    wrong ones whose class does not occur in the patch; score; its AUROC; removed, see
    `removed_share`.
    """
    rows = []
    scores = {"confidence": pixels["confidence"]}
    scores |= {name: head[name] for name in head if name not in ("hamming", "oracle")}
    for threshold in THRESHOLDS:
        chosen = pixels["confidence"] >= threshold
        right = pixels["right"][chosen]
        absent = head["oracle"][chosen][~right] < 0.5
        for name, score in scores.items():
            rows.append(
                {
                    "threshold": threshold,
                    "coverage": float(chosen.mean()),
                    "accuracy": float(right.mean()) if right.size else None,
                    "oracle": float(absent.mean()) if absent.size else None,
                    "score": name,
                    "auroc": area_under_roc(right, score[chosen]),
                    "removed": removed_share(right, score[chosen]),
                }
            )
    return rows


def goes_on(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a geometry is worth training, by its rows of one threshold."""
    gamma = [row["auroc"] or 0 for row in rows if row["score"] != "confidence"]
    oracle = rows[0]["oracle"]
    return oracle is not None and oracle >= _LEAST_REMOVED and max(gamma) > _LEAST_AREA


@dataclasses.dataclass(frozen=True)
class Evidence0(Figure):
    """What patch classifiers on frozen networks know about wrong pseudo-labels.

    Attributes:
      taps: names of taps, A+B; "" for all with patches of 2 to 20 % of the crop.
      head: the patch classifiers' `mpmc.head`.
      steps: training steps of the patch classifiers.
      images: crops of unlabeled images that are measured.
    """

    taps: str = ""
    head: str = "lite"
    steps: int = 300
    images: int = 200

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Trains the patch classifiers, and draws AUROC by score."""
        for name in ("steps", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        rows = [row for run in by_name(runs).values() for row in self._rows(run)]
        drawing = drawing_of(_panels(rows), rows)
        how = (
            f"Patch classifiers: `mpmc.head={self.head}`, {self.steps} steps. Crops of "
            f"unlabeled images: {self.images}. Revision {git_revision()}."
        )
        page = {"evidence0.md": f"{markdown(rows)}\n{how}\n".encode()}
        return dataclasses.replace(drawing, others=page)

    def _rows(self, saved: SavedRun) -> list[dict[str, Any]]:
        """Measures one run."""
        taps = [tap for tap in self.taps.split("+") if tap]
        screen = open_screen(saved.restored, taps, self.head)
        lists = saved.workdir.absolute() / "splits"
        labeled, unlabeled = (
            screen.crops(str(lists / f"{name}.txt"))
            for name in ("labeled", "unlabeled")
        )
        heads = train_heads(screen, labeled, self.steps)
        look = jax.jit(lambda crops: measure(screen, heads, crops))
        pixels, found = draw_pixels(look, unlabeled, self.images)
        rows = []
        for plugin, head in zip(screen.plugins, found, strict=True):
            share = plugin.field.size / screen.config.data.crop
            geometry = {
                "run": saved.name,
                "step": screen.run.step,
                "tap": plugin.tap,
                "windows": "+".join(map(str, plugin.windows)),
                "field": plugin.field.size,
                "share_of_crop": share**2,
                "hamming": float(head["hamming"].mean()),
            }
            rows += [{**geometry, **row} for row in rows_of_head(pixels, head)]
        return rows


def _by_geometry(
    rows: Sequence[dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each run, tap, windows and threshold."""
    keys = ("run", "tap", "windows", "threshold")
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in keys]):
        yield list(group)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Makes the page: a table of AUROC and removed shares by geometry and threshold."""
    names = list(dict.fromkeys(row["score"] for row in rows))
    head = ["run", "tap", "windows", "patch", "% of crop", "Hamming", "threshold"]
    head += ["coverage", "accuracy", "oracle removes", *names, "goes on"]
    lines = []
    for group in _by_geometry(rows):
        first = group[0]
        lines.append(
            [
                f"{first['run']} ({first['step']})",
                first["tap"],
                first["windows"],
                str(first["field"]),
                f"{100 * first['share_of_crop']:.1f}",
                _shown(first["hamming"], ".3f"),
                str(first["threshold"]),
                _shown(first["coverage"], ".3f"),
                _shown(first["accuracy"], ".3f"),
                _shown(first["oracle"], ".1%"),
                *(
                    f"{_shown(row['auroc'], '.2f')} ({_shown(row['removed'], '.1%')})"
                    for row in group
                ),
                "yes" if goes_on(group) else "no",
            ]
        )
    table = markdown_table(head, lines)
    return (
        "# Evidence, stage 0: patch classifiers on networks that do not change\n\n"
        "Of pseudo-labels at least as confident as the threshold: coverage, accuracy, "
        "and the share of wrong ones whose class does not occur in their patch (what "
        "an oracle removes). For each score its AUROC between right and wrong "
        "pseudo-labels and, in brackets, the share of wrong weight that it removes at "
        "equal total weight. `_max`: divided by the patch's largest gamma. `sigmoid` "
        "ranks pixels as the patch logit does. A geometry goes on if the oracle "
        f"removes at least {_LEAST_REMOVED:.0%} and a gamma's AUROC exceeds "
        f"{_LEAST_AREA}.\n\n{table}\n"
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per threshold: AUROC by score, a line per run and geometry."""
    canvas, axes = style.grid(len(THRESHOLDS), 4.2, 4.4, sharey=True)
    for threshold, axis in zip(THRESHOLDS, axes, strict=True):
        for group in _by_geometry(rows):
            if group[0]["threshold"] != threshold:
                continue
            known = [row for row in group if row["auroc"] is not None]
            axis.plot(
                [row["score"] for row in known],
                [row["auroc"] for row in known],
                label=f"{group[0]['run']}: {group[0]['tap']}, {group[0]['windows']}",
            )
        axis.axhline(0.5, color=style.GRAY, linestyle=":", marker="")
        axis.set_title(f"confidence at least {threshold}")
        axis.tick_params(axis="x", rotation=90)
    axes[0].set_ylabel("AUROC, right against wrong")
    style.legend_below(canvas, axes[0])
    return canvas
