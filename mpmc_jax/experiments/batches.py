"""What a run does with its batches besides training on them."""

from collections.abc import Callable, Iterator

import ml_collections

from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.data.splits import Split
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.build import Setup
from mpmc_jax.training import precise_bn
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.state import TrainState
from mpmc_jax.types import Batch


def make_place(pipeline: TrainPipeline, parallel: Parallel) -> Callable[[Batch], Batch]:
    """What puts batches on the devices; with `data.resident` the images as well.

    Raises:
      ValueError: these are too large for a device.
    """
    resident = pipeline.resident
    if resident is None:
        return parallel.place
    if resident.bytes > parallel.memory() / 2:
        raise ValueError(
            f"data.resident=true: the images take {resident.bytes / 1e9:.2f} GB of a "
            f"device of {parallel.memory() / 1e9:.2f} GB; set data.resident=false"
        )
    return parallel.placing(resident.arrays, resident.cut)


def make_bn_recompute(
    config: ml_collections.ConfigDict,
    setup: Setup,
    pipeline: TrainPipeline,
    parallel: Parallel,
    place: Callable[[Batch], Batch],
) -> Callable[[TrainState], TrainState] | None:
    """What `train.precise_bn` does to the evaluated network of a replicated state."""
    batches = config.train.precise_bn
    if not batches:
        return None

    def read() -> Iterator[Batch]:
        data = pipeline.iterator(requests=False)
        try:
            yield from (place(next(data)) for _ in range(batches))
        finally:
            data.close()

    recompute_bn_stats = precise_bn.make_bn_recompute(
        parallel, setup.step, read, batches
    )

    def change(state: TrainState) -> TrainState:
        one = parallel.fetch(state)
        return recompute_bn_stats(state, runs.network_to_use(config, setup, one))

    return change


def names_of(split: Split, batch: Batch) -> dict[str, list[str]]:
    """The ids of a batch's images by stream."""
    names = {"labeled": [split.labeled[i] for i in batch.labeled.index]}
    if batch.unlabeled is not None:
        names["unlabeled"] = [split.unlabeled[i] for i in batch.unlabeled.index]
    if batch.partner is not None:
        names["partner"] = [split.unlabeled[i] for i in batch.partner.index]
    if batch.source is not None:
        there = batch.source.extent.any(axis=1)
        names["source"] = [split.labeled[i] for i in batch.source.index[there]]
    return names
