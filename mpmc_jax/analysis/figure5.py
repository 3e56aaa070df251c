"""t-SNE of the penultimate features of chosen classes (Figure 5)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.analysis.examples import choose_classes, open_common
from mpmc_jax.data.dataset import EvalDataset, EvalExample
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import resize_nearest
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run
from mpmc_jax.types import Array, Network, PyTree

# Classes that the palette tells apart, and how many are shown where none is named.
_MOST_CLASSES = len(style.COLORS)
_SHOWN = 6
# Two points have no neighborhood.
_FEWEST_POINTS = 4


def feature_function(run: Run) -> Callable[[EvalExample], tuple[Any, Any]]:
    """Returns the function from an image to its features and their classes.

    The features, (h,w,d), are the decoder's last map, which the classifier of pixels
    reads; the classes, (h,w), are those of the truth at the nearest pixel.
    """
    protocol, multiple = make_protocol(run.config), run.module.multiple

    @bounded_jit()
    def compute(variables: PyTree, images: Array, labels: Array):
        images = network_input(images, run.facts.pixels)
        images, labels = protocol.probed(images, labels)
        # Only whole patches of the encoder are read.
        rows, columns = (side - side % multiple for side in labels.shape[1:])
        images, labels = images[:, :rows, :columns], labels[:, :rows, :columns]
        network = Network(run.module, **variables)
        features = network.frozen().tap_map(images, "decoder")
        return features, resize_nearest(labels, size=features.shape[1:3])

    def of_example(example: EvalExample):
        found = compute(run.variables, example.image[None], example.label[None])
        features, classes = (np.asarray(x[0]) for x in found)
        return features, classes

    return of_example


@dataclasses.dataclass(frozen=True)
class Points:
    """Sampled features of an images' set.

    Attributes:
      features: (n,d).
      classes: (n,) of the truth.
    """

    features: np.ndarray
    classes: np.ndarray


def sample(
    run: Run, dataset: EvalDataset, classes: Sequence[int], pixels: int, seed: int
) -> Points:
    """Samples features of each class from all images.

    The sample depends on the truth and the size of the map alone, so that it has the
    same pixels in runs of one network.
    """
    features_of = feature_function(run)
    rng = np.random.default_rng(seed)
    share = max(pixels // len(dataset), 1)
    kept: dict[int, list[np.ndarray]] = {number: [] for number in classes}
    for example in dataset:
        features, label = features_of(example)
        for number, parts in kept.items():
            found = np.flatnonzero(label == number)
            # Twice an image's share, for images without the class.
            chosen = rng.permutation(found)[: 2 * share]
            parts.append(features.reshape(-1, features.shape[-1])[chosen])
    pools = {number: np.concatenate(parts) for number, parts in kept.items()}
    for number, pool in pools.items():
        pools[number] = pool[rng.permutation(len(pool))[:pixels]]
    return Points(
        np.concatenate([*pools.values()]),
        np.repeat([*pools], [len(pool) for pool in pools.values()]),
    )


@dataclasses.dataclass(frozen=True)
class Figure5(Figure):
    """Figure 5: t-SNE of the decoder's last features of chosen classes, per run.

    Attributes:
      classes: class names joined by "+", at most 8; "" for the most frequent ones.
      pixels: features per class.
      perplexity: of t-SNE.
      seed: of the sample and of t-SNE.
    """

    classes: str = ""
    pixels: int = 200
    perplexity: float = 30.0
    seed: int = 0

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws a panel per run."""
        if self.pixels < 1:
            raise ValueError(f"pixels={self.pixels}: at least 1 is needed")
        named, dataset = by_name(runs), open_common(runs)
        facts = runs[0].restored.facts
        chosen = choose_classes(facts, self.classes)
        if not self.classes:
            chosen = _most_frequent(dataset, facts.num_classes)
        if len(chosen) > _MOST_CLASSES:
            raise ValueError(
                f"classes={self.classes}: more than {_MOST_CLASSES} colors cannot be "
                "told apart; name fewer"
            )
        rows = []
        for name, run in named.items():
            points = sample(run.restored, dataset, chosen, self.pixels, self.seed)
            if len(points.classes) < _FEWEST_POINTS:
                raise ValueError(
                    f"classes={self.classes}: only {len(points.classes)} features of "
                    "them in the validation images; name others"
                )
            for number, place in zip(points.classes, self._embed(points), strict=True):
                label = {"run": name, "class": facts.class_names[number]}
                rows.append(label | dict(zip("xy", place.tolist(), strict=True)))
        return drawing_of(_panels(rows), rows)

    def _embed(self, points: Points) -> np.ndarray:
        """Embeds features by t-SNE: (n,2)."""
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        # scikit-learn refuses a perplexity that is not below the number of points.
        perplexity = min(self.perplexity, (len(points.features) - 1) / 3)
        embedding = TSNE(perplexity=perplexity, init="random", random_state=self.seed)
        # On one thread, sums have one order, and a sample one picture.
        with threadpool_limits(1):
            return embedding.fit_transform(points.features.astype(np.float32))


def _most_frequent(dataset: EvalDataset, num_classes: int) -> list[int]:
    """Returns the classes with most labeled pixels, in the order of their numbers."""
    count = sum(
        np.bincount(example.label.ravel(), minlength=256)[:num_classes]
        for example in dataset
    )
    return sorted(np.argsort(-np.asarray(count), kind="stable")[:_SHOWN].tolist())


def _panels(rows: Sequence[dict[str, Any]]):
    """Draws a panel per run, a color per class."""
    runs, classes = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "class")
    )
    canvas, axes = style.grid(len(runs), 3.6, 3.6, columns=3)
    for run, axis in zip(runs, axes, strict=True):
        for position, name in enumerate(classes):
            own = [row for row in rows if (row["run"], row["class"]) == (run, name)]
            axis.scatter(
                [row["x"] for row in own],
                [row["y"] for row in own],
                s=14,
                color=style.COLORS[position],
                marker=style.MARKERS[position],
                linewidths=0,
                label=name,
            )
        axis.set(title=style.wrapped(run, 3.3), xticks=[], yticks=[])
    style.legend_below(canvas, axes[0], markerscale=2)
    return canvas
