"""Evaluation's speed where sizes vary: batches by size beside one image at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from launch.bench.pytorch.run import Peer, restored
from launch.bench.timing import COMPILED, FOUND, counted, empty_cache, spread
from mpmc_jax.data.build import build_eval
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.experiments.build import build_setup
from mpmc_jax.experiments.evaluation import make_evaluator
from mpmc_jax.experiments.run import model_and_method, open_model_and_method
from mpmc_jax.methods.base import Method
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import init_variables
from mpmc_jax.models.weights.torch_names import torch_state_dict
from mpmc_jax.pixels import RGB

_CLASSES = 21


@dataclasses.dataclass(frozen=True)
class _Example:
    id: str
    image: np.ndarray
    label: np.ndarray


class MadeUp(NamedTuple):
    """How many images, of how many distinct sizes, and pixels of the longest side.

    The shortest side has two fifths of these.
    """

    images: int
    sizes: int
    largest: int


class _Images:
    """Made-up labeled images of a number of sizes, as many of each as of any other."""

    def __init__(self, images: int, sizes: int, largest: int):
        rng = np.random.default_rng(0)
        distinct: set[tuple[int, int]] = set()
        while len(distinct) < sizes:
            rows, columns = rng.integers(2 * largest // 5, largest + 1, 2)
            distinct.add((int(rows), int(columns)))
        order = sorted(distinct)
        self._sizes = [order[i] for i in rng.permutation(images) % sizes]
        self.volumes = [""] * images

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> _Example:
        rng = np.random.default_rng(index)
        size = self._sizes[index]
        return _Example(
            str(index),
            rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            rng.integers(0, _CLASSES, size, dtype=np.uint8),
        )

    def size(self, index: int) -> tuple[int, int]:
        return self._sizes[index]


class _Parts(NamedTuple):
    """What is evaluated: a network that begins at random, and labeled images."""

    facts: DatasetFacts
    model: ModelConfig
    method: Method
    source: Any


def _parts(config: ml_collections.ConfigDict, made_up: MadeUp) -> _Parts:
    if not made_up.images:
        return _Parts(*open_model_and_method(config), build_eval(config, "val"))
    names = tuple(str(i) for i in range(_CLASSES))
    palette = ((0, 0, 0),) * _CLASSES
    facts = DatasetFacts("made-up", names, palette, RGB, fingerprint="")
    source = _Images(*made_up)
    return _Parts(facts, *model_and_method(config, facts, made_up.images), source)


def bench_eval(
    config: ml_collections.ConfigDict,
    repeats: int,
    made_up: MadeUp,
    *,
    peer: bool = False,
) -> dict[str, Any]:
    """Seconds of an evaluation: first, with its programs on disk, and in memory.

    Args:
      config: of a run; its network begins at random.
      repeats: evaluations with programs in memory; the median counts.
      made_up: the images; where it has none, the data set's val.
      peer: whether PyTorch evaluates them one by one, in turns with the batches.
    """
    facts, model, method, source = _parts(config, made_up)
    setup = build_setup(config, model, method, steps_per_epoch=1)
    module = setup.step.modules[method.networks[0]]
    variables = init_variables(jax.random.key(0), model)
    evaluator = make_evaluator(config, module, facts)
    found: dict[str, Any] = {}
    seen: list[EvalResult] = []
    batch_sizes = {"one_by_one_": 1, "": config.eval.batch_size}
    if config.eval.batch_size == 1:
        del batch_sizes["one_by_one_"]
    for name, batch_size in batch_sizes.items():
        config.eval.batch_size = batch_size
        with empty_cache():
            evaluator = make_evaluator(config, module, facts)
            for when in ("cold", "cached", "warm"):
                if when == "cached":
                    jax.clear_caches()
                    evaluator = make_evaluator(config, module, facts)
                times = []
                with counted() as counts:
                    for _ in range(repeats if when == "warm" else 1):
                        seen.append(evaluator.run(variables, source))
                        times.append(seen[-1].seconds)
                found[f"{name}{when}_seconds"] = float(np.median(times))
                found[f"{name}{when}_compiled"] = counts[COMPILED] - counts[FOUND]
    for other in seen[1:]:
        np.testing.assert_array_equal(other.confusion.sum(1), seen[0].confusion.sum(1))
    if peer:
        found |= _beside_torch(
            config, repeats, made_up, lambda: evaluator.run(variables, source)
        )
    return {
        "images_per_second": len(source) / found["warm_seconds"],
        "images": len(source),
        "distinct_sizes": len({source.size(i) for i in range(len(source))}),
        "network_programs": seen[0].programs,
        "devices": len(jax.local_devices()),
        **found,
    }


def _beside_torch(
    config: ml_collections.ConfigDict,
    repeats: int,
    made_up: MadeUp,
    run: Callable[[], EvalResult],
) -> dict[str, Any]:
    """Times in turns, images a second over PyTorch's, and pixels counted alike."""
    with Peer(_make_torch, config.to_dict(), made_up) as torch:
        theirs, _ = torch.ask()
        turns = [(run(), torch.ask()[1]) for _ in range(repeats)]
    ours = turns[0][0].confusion
    rates = [seconds / result.seconds for result, seconds in turns]
    return {
        "torch_seconds": spread([seconds for _, seconds in turns]),
        "rate_over_torch": spread(rates),
        "pixels_as_torch": float(np.minimum(ours, theirs).sum() / ours.sum()),
    }


def _make_torch(settings: dict[str, Any], made_up: MadeUp) -> Callable[[], np.ndarray]:
    """The confusion matrix, of the same weights and images."""
    from launch.bench.pytorch import eval as peer_eval

    facts, model, _, source = _parts(restored(settings), made_up)
    weights = torch_state_dict(init_variables(jax.random.key(0), model), model)
    evaluate = peer_eval.make_evaluation(model, weights, facts.pixels)
    return lambda: evaluate(source)
