"""Patch classifiers on the taps of a saved run's network, which does not change.

The stage 0 of the evidence (`analysis/evidence0.py`) trains them on the run's labeled
crops and measures them on crops of its unlabeled images.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mpmc_jax.data.build import build_train
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.experiments.build import tap_info
from mpmc_jax.experiments.run import Run
from mpmc_jax.losses.multilabel import asymmetric_focal_loss
from mpmc_jax.models.registry import (
    build_segmenter,
    receptive_field,
    tap_channels,
)
from mpmc_jax.plugins.mpmc import MPMC, patch_targets
from mpmc_jax.plugins.registry import build_plugin
from mpmc_jax.random_keys import key_of_name
from mpmc_jax.training.optimizer import Schedule, build_optimizer
from mpmc_jax.types import Array, Crops, Network, PyTree, Streams

# Pooling windows that are tried on each tap.
_WINDOWS = ((1,), (1, 7, 19))
# Share of the crop's area that a patch may have where no taps are named.
_SHARES = (0.02, 0.2)


@dataclasses.dataclass(frozen=True)
class Screen:
    """A network that does not change, and the patch classifiers on its taps.

    Attributes:
      run: the restored run.
      config: settings of its data and of the patch classifiers.
      plugins: a patch classifier for each tap and windows.
    """

    run: Run
    config: ml_collections.ConfigDict
    plugins: tuple[MPMC, ...]

    @property
    def network(self) -> Network:
        """The network that makes the pseudo-labels."""
        return Network(self.run.module, **self.run.variables).frozen()

    def init(self) -> tuple[PyTree, ...]:
        """Makes the variables of all patch classifiers."""
        key = jax.random.key(self.config.seed)
        heads = []
        for plugin in self.plugins:
            example = jnp.zeros((1, 8, 8, tap_channels(self.run.model, plugin.tap)))
            own = key_of_name(key, f"{plugin.tap}/{plugin.windows}")
            heads.append(plugin.init(own, {plugin.tap: example}))
        return tuple(heads)

    def taps(self, images: Array) -> dict[str, Array]:
        """Computes the taps that the patch classifiers read."""
        names = {plugin.tap for plugin in self.plugins}
        return {name: self.network.tap_map(images, name) for name in sorted(names)}

    def loss(
        self, params: tuple[PyTree, ...], stats: tuple[PyTree, ...], crops: Crops
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """Computes the sum over patch classifiers of L_l^M, and their statistics."""
        taps = self.taps(network_input(crops.image, self.run.facts.pixels))
        total, updated = jnp.zeros(()), []
        for plugin, own, kept in zip(self.plugins, params, stats, strict=True):
            logits, after = plugin.classifier().apply(
                {"params": own, "batch_stats": kept},
                taps[plugin.tap],
                train=True,
                mutable=["batch_stats"],
            )
            targets, valid = self.truth(plugin, crops)
            total += asymmetric_focal_loss(
                logits,
                targets,
                gamma_pos=plugin.gamma_pos,
                gamma_neg=plugin.gamma_neg,
                where=valid,
            )
            updated.append(after["batch_stats"])
        return total, tuple(updated)

    def truth(self, plugin: MPMC, crops: Crops) -> tuple[Array, Array]:
        """Finds the classes of every patch, and which patches have a labeled pixel."""
        assert crops.label is not None  # `crops` reads labels.
        return patch_targets(
            crops.label, plugin.num_classes, plugin.field, size=plugin.tap_size
        )

    def crops(self, ids: str) -> Iterator[Crops]:
        """Yields batches of training crops, with labels, of a list of images."""
        config = copy.deepcopy(self.config)
        config.data.labeled_ids, config.data.unlabeled_ids = ids, ""
        config.data.allow_absent_classes = True
        config.train.epoch_of = "unlabeled"
        pipeline = build_train(config, Streams(unlabeled=False))
        with contextlib.closing(pipeline.iterator(requests=False)) as batches:
            for batch in batches:
                yield batch.labeled


def open_screen(run: Run, taps: Sequence[str], head: str) -> Screen:
    """Plans the patch classifiers of a restored run.

    Raises:
      ValueError: an unknown tap or head, or no tap fits.
    """
    config = copy.deepcopy(run.config)
    # Crops are of one stream, whatever the run's method reads.
    config.data.resident, config.data.partner = False, "auto"
    # Labels must not choose where the measured crops lie.
    config.imbalance.crop_probability = 0.0
    config.mpmc.enabled, config.mpmc.head = True, head
    plugins = []
    for tap in taps or _fitting(run):
        for windows in _WINDOWS:
            config.mpmc.tap, config.mpmc.windows = tap, windows
            plugin = build_plugin(config, tap_info(config, run.model, None))
            assert isinstance(plugin, MPMC)  # It is enabled.
            plugins.append(plugin)
    return Screen(run, config, tuple(plugins))


def _fitting(run: Run) -> list[str]:
    """Returns the encoder's taps whose patches are neither small nor large.

    Raises:
      ValueError: there is none.
    """
    crop = run.config.data.crop
    found = []
    for tap in build_segmenter(run.model).taps:
        share = (receptive_field(run.model, tap).size / crop) ** 2
        if _SHARES[0] <= share <= _SHARES[1]:
            found.append(tap)
    if not found:
        raise ValueError(
            f"no tap has patches of {_SHARES[0]:.0%} to {_SHARES[1]:.0%} of a crop of "
            f"{crop} x {crop} pixels; name some, as in --options=taps=layer1+layer2"
        )
    return found


def train_heads(
    screen: Screen, batches: Iterator[Crops], steps: int
) -> tuple[PyTree, ...]:
    """Trains the patch classifiers on labeled crops, with the run's optimizer."""
    settings = screen.config.optimizer
    optimizer = build_optimizer(
        Schedule(settings.lr, steps, settings.power),
        name=settings.name,
        head_multiplier=settings.head_multiplier,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        betas=tuple(settings.betas),
        eps=settings.eps,
    )
    heads = screen.init()
    params = tuple(head["params"] for head in heads)
    stats = tuple(head["batch_stats"] for head in heads)

    @jax.jit
    def step(params: PyTree, stats: PyTree, state: PyTree, crops: Crops):
        grads, stats = jax.grad(screen.loss, has_aux=True)(params, stats, crops)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    state = optimizer.init(params)
    for crops in itertools.islice(batches, steps):
        params, stats, state = step(params, stats, state, crops)
    return tuple(
        {"params": own, "batch_stats": kept}
        for own, kept in zip(params, stats, strict=True)
    )
