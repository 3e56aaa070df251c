"""A method is one file and one line of the registry, and may train several networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from mpmc_jax.experiments import evaluation
from mpmc_jax.methods import base, registry
from mpmc_jax.training.state import variables_of
from mpmc_jax.types import Outputs, Region, Streams, View
from tests.support import tiny


class Inputs(struct.PyTreeNode):
    image: jax.Array
    label: jax.Array
    weak: jax.Array


@dataclasses.dataclass(frozen=True)
class Twins(base.Method):
    """Two networks, each trained on the labels and on the other's classes."""

    networks = ("a", "b")
    streams = Streams()
    teacher = "student"

    def augment(self, batch, state, keys):
        del state, keys
        image, weak = (
            self.normalize(self.to_unit(crops.image))
            for crops in (batch.labeled, batch.unlabeled)
        )
        return Inputs(image=image, label=base.labels(batch), weak=weak)

    def regions(self, inputs):
        everywhere = jnp.ones(inputs.weak.shape[:3], bool)
        labeled = base.supervised_region(inputs.label)
        unlabeled = Region(valid=everywhere, real=everywhere)
        return {
            name: region
            for network in self.networks
            for name, region in (
                (f"supervised_{network}", labeled),
                (f"unlabeled_{network}", unlabeled),
            )
        }

    def prepare(self, teachers, inputs, state):
        del teachers, inputs
        return None, {}, state

    def views(self, students, teachers, inputs, targets, state):
        del targets
        passes, after = {}, {}
        both = jnp.concatenate([inputs.image, inputs.weak])
        for name in self.networks:
            passed, after[name] = base.full_pass(students[name], both)
            passes[name] = passed.halves()
        regions = self.regions(inputs)
        supervised, views = [], []
        for name, other in zip(self.networks, self.networks[::-1], strict=True):
            labeled, unlabeled = passes[name]
            part = base.supervised_part(labeled, inputs.label)
            part = part.replace(name=f"supervised_{name}", student_name=name)
            supervised.append(part)
            views.append(
                View(
                    logits=unlabeled.logits,
                    taps=unlabeled.taps,
                    image=inputs.weak,
                    target=jnp.argmax(passes[other][1].logits, axis=-1),
                    weight=jnp.ones(inputs.weak.shape[:3]),
                    region=regions[f"unlabeled_{name}"],
                    teacher=teachers[other],
                    name=f"unlabeled_{name}",
                    student_name=name,
                    teacher_name=other,
                )
            )
        return Outputs(tuple(supervised), tuple(views), after, state)

    def average_decays(self, step, steps_per_epoch):
        del step, steps_per_epoch


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    entry = registry.METHODS["supervised"]._replace(make=lambda *_: Twins())
    monkeypatch.setitem(registry.METHODS, "twins", entry)


def test_evaluation_names_one_of_the_networks():
    cfg = tiny.config("method=unimatch,mpmc=off", method__name="twins")
    parts = tiny.setup(cfg)
    state = tiny.init_state(parts, cfg.seed)
    for choice, name in (("auto", "a"), ("a", "a"), ("b", "b")):
        cfg.eval.network = choice
        evaluation.check_network(cfg, parts)
        network = evaluation.evaluated_network(cfg, parts, state)
        assert network == (name, False) and network.name == name
        assert (
            variables_of(state, network.student, averaged=network.averaged)["params"]
            is state.params[name]
        )
    for choice in ("c", "student"):
        cfg.eval.network = choice
        message = rf"eval.network='{choice}' is unknown; valid: \['auto', 'a', 'b'"
        with pytest.raises(ValueError, match=message):
            evaluation.check_network(cfg, parts)
    cfg.eval.network = "teacher"
    with pytest.raises(ValueError, match="method.name='twins' keeps no average"):
        evaluation.check_network(cfg, parts)


@pytest.mark.full
def test_two_networks_teach_each_other():
    cfg = tiny.config("method=unimatch,mpmc=recommended", method__name="twins")
    state, steps = tiny.run(cfg, 2)
    assert set(state.params) == {"a", "b", "plugin"}
    for metrics in steps:
        values = metrics.values
        names = [f"{kind}_{n}" for kind in ("supervised", "unlabeled") for n in "ab"]
        losses = {name: values[f"loss_{name}"] for name in names}
        assert all(np.isfinite(loss) and loss > 0 for loss in losses.values())
        # The unlabeled weight is alpha; of each network MPMC adds L_l^M and 0.15 L_u^M.
        total = (
            losses["supervised_a"]
            + losses["supervised_b"]
            + 0.25 * (losses["unlabeled_a"] + losses["unlabeled_b"])
            + 2 * values["loss_patch_labeled"]
            + 2 * 0.15 * values["loss_patch_unlabeled"]
        )
        np.testing.assert_allclose(values["loss"], total, rtol=1e-5)
    a, b = (jax.tree.leaves(state.params[name]) for name in "ab")
    assert any(np.any(x != y) for x, y in zip(a, b, strict=True))
