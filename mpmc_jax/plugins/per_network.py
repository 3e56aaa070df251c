"""A plug-in for methods of several networks: one set of its variables for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.plugins.base import Identity, Plugin, PluginLosses
from mpmc_jax.random_keys import key_of_name
from mpmc_jax.types import Array, Network, PyTree, Region, Supervised, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerNetwork(Plugin):
    """Runs a plug-in once per network, with variables of its own.

    A network's variables are trained on the taps of its own passes, and reweight the
    views that the network labels. The terms of all networks are added. Evaluation uses
    the first network's. This is row D28 of docs/deviations.md.

    Attributes:
      plugin: the plug-in.
      networks: names of the students.
    """

    plugin: Plugin
    networks: tuple[str, ...]

    @property
    def classifies_patches(self) -> bool:
        """See `Plugin`."""
        return self.plugin.classifies_patches

    @property
    def taps(self) -> tuple[str, ...]:
        """See `Plugin`."""
        return self.plugin.taps

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """Makes variables {"params": {network: ...}, "batch_stats": {network: ...}}."""
        made = {
            name: self.plugin.init(key_of_name(key, name), taps)
            for name in self.networks
        }
        kinds = next(iter(made.values()))
        return {kind: {name: made[name][kind] for name in made} for kind in kinds}

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """See `Plugin`; no two networks have parts or views of the same name."""
        return self.plugin.counts(regions)

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        reduction: Reduction,
        active: Array | None,
    ) -> tuple[tuple[View, ...], dict[str, Any]]:
        """Reweights each view with the variables of the network that labeled it."""
        refined, targets = {}, {}
        for name in self.networks:
            own = [view for view in views if view.teacher_name == name]
            changed, made = self.plugin.refine(
                _of(variables, name), own, reduction, active
            )
            refined |= {view.name: view for view in changed}
            targets |= made
        return tuple(refined[view.name] for view in views), targets

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Sequence[Supervised],
        views: Sequence[View],
        targets: Mapping[str, Any],
        reduction: Reduction,
    ) -> PluginLosses:
        """Adds up the terms, and the metrics, of all networks."""
        terms: dict[str, Array] = {}
        metrics: dict[str, tuple[Array, Array]] = {}
        stats = {}
        for name in self.networks:
            found = self.plugin.losses(
                _of(variables, name),
                [part for part in supervised if part.student_name == name],
                [view for view in views if view.student_name == name],
                targets,
                reduction,
            )
            for key, term in found.terms.items():
                terms[key] = terms[key] + term if key in terms else term
            for key, (total, count) in found.metrics.items():
                before = metrics.get(key, (0, 0))
                metrics[key] = (before[0] + total, before[1] + count)
            stats[name] = found.batch_stats
        return PluginLosses(terms, metrics, stats)

    def classify_patches(
        self,
        teacher: Network,
        variables: Mapping[str, PyTree],
        images: Array,
        labels: Array,
    ) -> tuple[Array, Array, Array]:
        """See `Plugin`; `teacher` is the first network."""
        own = _of(variables, self.networks[0])
        return self.plugin.classify_patches(teacher, own, images, labels)

    def weigh_pixels(self, logits: Array, labels: Array) -> Array:
        """See `Plugin`."""
        return self.plugin.weigh_pixels(logits, labels)


def per_network(plugin: Plugin, networks: tuple[str, ...]) -> Plugin:
    """Returns the plug-in for a method's networks."""
    if len(networks) == 1 or isinstance(plugin, Identity):
        return plugin
    return PerNetwork(
        plugin=plugin,
        networks=networks,
        teacher_head=plugin.teacher_head,
        warmup_epochs=plugin.warmup_epochs,
    )


def _of(variables: Mapping[str, PyTree], name: str) -> dict[str, PyTree]:
    return {kind: trees[name] for kind, trees in variables.items()}
