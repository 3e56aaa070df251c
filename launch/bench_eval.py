"""Evaluation's speed where sizes vary: batches by size beside one image at a time."""

import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np

from launch.measuring import COMPILED, FOUND, counted, empty_cache
from launch.runs import base_for, make_evaluator, open_base
from mpmc_jax.data.build import build_eval
from mpmc_jax.data.info import DatasetFacts
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.models.build import init_variables
from mpmc_jax.pixels import RGB
from mpmc_jax.training.build import build_setup

_CLASSES = 21


@dataclasses.dataclass(frozen=True)
class _Example:
    id: str
    image: np.ndarray
    label: np.ndarray


class _Images:
    """Made-up labelled images of a number of sizes, as many of each as of any other."""

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


def bench_eval(
    config: ml_collections.ConfigDict,
    repeats: int,
    *,
    images: int,
    sizes: int,
    largest: int,
) -> dict[str, Any]:
    """Seconds of an evaluation: first, with its programs on disk, and in memory.

    Args:
      config: of a run; its network begins at random.
      repeats: evaluations with programs in memory; the median counts.
      images: made-up ones; 0 takes the data set's val.
      sizes: how many distinct ones these have.
      largest: pixels of their longest side; the shortest has two fifths of it.
    """
    if images:
        names = tuple(str(i) for i in range(_CLASSES))
        palette = ((0, 0, 0),) * _CLASSES
        facts = DatasetFacts("made-up", names, palette, RGB, fingerprint="")
        model, method = base_for(config, facts, images)
        source: Any = _Images(images, sizes, largest)
    else:
        facts, model, method = open_base(config)
        source = build_eval(config, "val")
    setup = build_setup(config, model, method, steps_per_epoch=1)
    module = setup.step.modules[method.networks[0]]
    variables = init_variables(jax.random.key(0), model)
    found: dict[str, Any] = {}
    seen: list[EvalResult] = []
    for name, batch_size in (("", config.eval.batch_size), ("one_by_one_", 1)):
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
    return {
        "images_per_second": len(source) / found["warm_seconds"],
        "images": len(source),
        "distinct_sizes": len({source.size(i) for i in range(len(source))}),
        "network_programs": seen[0].programs,
        "devices": len(jax.local_devices()),
        **found,
    }
