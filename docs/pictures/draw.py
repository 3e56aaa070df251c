"""Draws the pictures of mpmc_in_pictures.md from procedural scenes and a trained run.

    PYTHONPATH=. python docs/pictures/draw.py runs/quickstart [--data_dir=data]

The run is that of `bash launch/quickstart.sh`. --output names another folder.
"""

import argparse
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mpmc_jax import ModelConfig, receptive_field
from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import SavedRun
from mpmc_jax.analysis.pseudo_label_maps import pseudo_label_function
from mpmc_jax.augmentation.mixing import draw_box
from mpmc_jax.augmentation.strong_views import strong_view
from mpmc_jax.data.builders import synthetic
from mpmc_jax.evaluation.pictures import colorize
from mpmc_jax.experiments.run import open_split
from mpmc_jax.plugins.mpmc import patch_targets

_FOLDER = pathlib.Path(__file__).parent
_DPI = 80
_PALETTE = tuple(synthetic.CLASSES.values())
_NAMES = tuple(synthetic.CLASSES)
_SIZE = (160, 224)
# Rows and columns of patches, of scene 3.
_PATCHES = ((25, 8), (24, 27), (31, 46))
_SHOWN = ("car", "person", "pole")


def _save(canvas: Canvas, path: pathlib.Path) -> None:
    canvas.savefig(path, dpi=_DPI)
    print(path)


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.asarray(unit)).astype(np.uint8)


def draw_views(folder: pathlib.Path) -> None:
    """Draws the views of an unlabeled image, and how two of them are mixed."""
    scenes = [synthetic.draw_scene(0, index, _SIZE) for index in (3, 8)]
    weak = [jnp.asarray(image[:160, :160] / 255.0) for image, _ in scenes]
    keys = jax.random.split(jax.random.key(2), 2)
    strong = [_bytes(view) for view in strong_view(keys, jnp.stack(weak))]
    # One of the keys for which there is a box.
    top, left, bottom, right = np.asarray(draw_box(jax.random.key(5), 160))
    mixed = strong[0].copy()
    mixed[top:bottom, left:right] = strong[1][top:bottom, left:right]
    rows = [[_bytes(weak[0]), strong[0], strong[1], mixed]]
    captions = (
        "weak view: crop, flip",
        "strong view: color, blur",
        "strong view of another image",
        "CutMix of both",
    )
    canvas, axes = style.picture_grid(rows, captions)
    for column in (2, 3):
        style.box(axes[0, column], (top, bottom), (left, right), style.ORANGE)
    _save(canvas, folder / "views.png")


def draw_patches(folder: pathlib.Path) -> None:
    """Draws patches, the classes in them, and the targets of three classes."""
    image, label = synthetic.draw_scene(0, 3, _SIZE)
    config = ModelConfig(backbone="resnet18", num_classes=len(_NAMES))
    field = receptive_field(config, "layer1")
    targets, _ = patch_targets(jnp.asarray(label[None]), len(_NAMES), field)
    targets = np.asarray(targets[0])
    colors = (style.ORANGE, style.SKY, style.YELLOW)
    maps = [
        np.repeat(np.repeat(255 * targets[..., _NAMES.index(name)], 4, 0), 4, 1)
        for name in _SHOWN
    ]
    rows = [
        [image, colorize(label, _PALETTE), None],
        [each[: _SIZE[0], : _SIZE[1], None].astype(np.uint8) for each in maps],
    ]
    captions = ("image", "labels", f"classes in the patches of {field.size} pixels")
    canvas, axes = style.picture_grid(rows, captions)
    lines = []
    for (row, column), color in zip(_PATCHES, colors, strict=True):
        sides = [
            np.clip(
                i * field.stride - field.padding + np.array((0, field.size)), 0, most
            )
            for i, most in zip((row, column), _SIZE, strict=True)
        ]
        for axis in axes[0, :2]:
            style.box(axis, *sides, color)
        present = [_NAMES[i] for i in np.flatnonzero(targets[row, column])]
        lines.append((color, ", ".join(present)))
    for place, (color, text) in zip((0.8, 0.5, 0.2), lines, strict=True):
        axes[0, 2].text(0.05, place, "■", color=color, fontsize=18, va="center")
        wrapped = style.wrapped(text, 2.4)
        axes[0, 2].text(0.17, place, wrapped, fontsize=10, va="center")
    for axis, name in zip(axes[1], _SHOWN, strict=True):
        axis.set_title(f"patches with the class {name}")
    _save(canvas, folder / "patches.png")


def draw_weights(folder: pathlib.Path, run: SavedRun, count: int = 3) -> None:
    """Draws pseudo-labels, which of them are wrong, and lambda_s."""
    restored = run.classifying
    predict = pseudo_label_function(restored)
    dataset = open_split(restored, "val")
    rows, weights = [], []
    for number in [
        i for i in range(len(dataset)) if dataset.size(i) == dataset.size(0)
    ][:count]:
        example = dataset[number]
        found = predict(
            jnp.asarray(example.image[None]), jnp.asarray(example.label[None])
        )
        label, weight = np.asarray(found.label[0]), np.asarray(found.weight[0])
        known = example.label < len(_NAMES)
        right = (label == example.label) | ~known
        verdict = np.where(right[..., None], 235, colorize(label, _PALETTE))
        weight = weight / weight.mean()
        print(
            f"{example.id}: mean lambda_s {weight[right & known].mean():.2f} where the "
            f"pseudo-label is right, {weight[~right].mean():.2f} where it is wrong"
        )
        weights.append(weight)
        rows.append(
            [example.image, colorize(label, _PALETTE), verdict.astype(np.uint8), None]
        )
    captions = ("image", "pseudo-labels", "wrong ones alone", "lambda_s over its mean")
    canvas, axes = style.picture_grid(rows, captions)
    for axis, weight in zip(axes[:, 3], weights, strict=True):
        shown = axis.imshow(weight, vmin=0.5, vmax=1.5, cmap="viridis")
    canvas.colorbar(shown, ax=axes[:, 3], shrink=0.6)
    _save(canvas, folder / "weights.png")


def _boxes(axis: Axes, places: Sequence[tuple[str, float, float, str]]) -> None:
    for text, x, y, color in places:
        axis.add_patch(
            FancyBboxPatch(
                (x - 0.85, y - 0.3),
                1.7,
                0.6,
                boxstyle="round,pad=0.05",
                fc=color,
                ec="0.3",
            )
        )
        axis.text(x, y, text, ha="center", va="center", fontsize=9)


def draw_overview(folder: pathlib.Path) -> None:
    """Draws what goes where in a training step."""
    canvas = Canvas(figsize=(9.2, 3.9))
    axis = canvas.subplots()
    axis.set_axis_off()
    axis.set_xlim(0, 11.4)
    axis.set_ylim(0, 4.6)
    data, network, head, loss = "#dfe9f3", "#fdf0d5", "#d8efe4", "#f6dde3"
    _boxes(
        axis,
        (
            ("labeled image", 1, 4, data),
            ("unlabeled image,\nstrong view", 1, 2.5, data),
            ("unlabeled image,\nweak view", 1, 1, data),
            ("student", 3.7, 3.25, network),
            ("teacher", 3.7, 1, network),
            ("patch classifier\non layer1", 6.4, 1.75, head),
            ("pseudo-labels", 6.4, 0.5, data),
            ("supervised loss,\nL_l^M on patches", 10.2, 4, loss),
            ("unlabeled loss,\nL_u^M on patches", 10.2, 2.5, loss),
            ("weights lambda_s\nand lambda_m", 8.5, 1, head),
        ),
    )
    for start, end in (
        ((1.9, 4), (2.8, 3.4)),
        ((1.9, 2.5), (2.8, 3.1)),
        ((1.9, 1), (2.8, 1)),
        ((4.6, 3.4), (9.3, 4)),
        ((4.6, 3.1), (9.3, 2.6)),
        ((4.6, 1.1), (5.5, 1.6)),
        ((4.6, 0.9), (5.5, 0.6)),
        ((7.3, 1.6), (7.9, 1.35)),
        ((7.3, 0.6), (7.9, 0.65)),
        ((9, 1.35), (9.8, 2.15)),
    ):
        axis.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=12, color="0.3"
            )
        )
    _save(canvas, folder / "overview.png")


def draw(folder: pathlib.Path, run: SavedRun) -> None:
    """Draws all pictures into a folder."""
    with style.applied():
        draw_overview(folder)
        draw_views(folder)
        draw_patches(folder)
        draw_weights(folder, run)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a run on the synthetic scenes")
    parser.add_argument("--data_dir", default="", help="its data, if they have moved")
    parser.add_argument("--output", default=_FOLDER, help="folder for the pictures")
    args = parser.parse_args()
    draw(
        pathlib.Path(args.output),
        SavedRun(pathlib.Path(args.run), "best", args.data_dir),
    )


if __name__ == "__main__":
    main()
