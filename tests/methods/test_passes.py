"""Passes in one batch: to batch norm they are those of a method's networks in a row."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mpmc_jax.experiments.build import init_state
from mpmc_jax.training.parallel import Layout
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Network
from tests.support import tiny

# The calls in train mode, with the passes in each.
CALLS = []


class InARow(Network):
    """A network that takes each pass of a batch by itself, and notes its calls."""

    def _each(self, call, tree, passes):
        network, results = self, []
        leaves, structure = jax.tree.flatten(tree)
        for parts in zip(*(jnp.split(leaf, passes) for leaf in leaves), strict=True):
            result, network = call(network, jax.tree.unflatten(structure, parts))
            results.append(result)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
        return joined, network

    def _note(self, call, passes):
        if self.train:
            CALLS.append((call, passes))

    def encode(self, images, until=None, dropout_keys=None, passes=1):
        self._note("encode", passes)

        def call(network, part):
            return Network.encode(network, part[0], until, part[1])

        return self._each(call, (images, dropout_keys), passes)

    def decode(self, features, decoder_dropout=None, passes=1):
        assert decoder_dropout is None
        self._note("decode", passes)
        return self._each(Network.decode, features, passes)


BOTH = [("encode", 2), ("decode", 2)]
# Of each method: settings, and the calls in train mode.
CASES = {
    # Clean and perturbed features are one pass of the decoder, strong views another.
    "unimatch": ({}, [("encode", 2), ("decode", 1), ("decode", 1)]),
    # Each network labels both crops of the mixed image, and learns.
    "cps": ({}, 4 * BOTH),
    # Apart, the teacher normalizes by its own batch.
    "mean_teacher": (
        {"method__normalization": "apart"},
        [("encode", 1), ("decode", 1), *BOTH],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_methods_passes_in_one_batch_equal_passes_in_a_row(name):
    settings, calls = CASES[name]
    cfg = tiny.config(f"method={name},mpmc=off", train__batch_size=4, **settings)
    parts = tiny.setup(cfg, axis_name=None)
    method = parts.step.method
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[layout.order(len(x), 1, 1)]),
        tiny.batch(0, cfg, method),
    )
    state = init_state(parts, 0)

    def views(kind):
        students = {
            each: kind(parts.step.modules[each], params, state.batch_stats[each], True)
            for each, params in state.params.items()
        }
        inputs = method.augment(batch, {}, make_keys(parts.step, state, batch))
        teachers = {each: network.frozen() for each, network in students.items()}
        targets, _, _ = method.prepare(teachers, inputs, {})
        outputs = method.views(students, teachers, inputs, targets, {})
        logits = {
            each.name: each.logits for each in (*outputs.supervised, *outputs.views)
        }
        taps = {each.name: each.taps for each in outputs.views}
        stats = {each: net.batch_stats for each, net in outputs.students.items()}
        return stats, logits, taps

    CALLS.clear()
    found, expected = (
        jax.jit(functools.partial(views, kind))() for kind in (Network, InARow)
    )
    assert calls == CALLS
    assert tiny.difference(found[0], state.batch_stats) > 0.01
    assert tiny.difference(found[0], expected[0]) < 1e-5
    assert tiny.difference(found[1:], expected[1:]) < 1e-3
