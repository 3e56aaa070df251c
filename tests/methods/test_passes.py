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
from tests.support.x64 import run_x64

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
UNIMATCH = [("encode", 2), ("decode", 1), ("decode", 1)]
# Of each method: settings, and the calls in train mode.
CASES = {
    # Clean and perturbed features are one pass of the decoder, strong views another.
    "unimatch": ({}, UNIMATCH),
    # Each network labels both crops of the mixed image, and learns.
    "cps": ({"model__remat": "cheap"}, 4 * BOTH),
    # Apart, the teacher normalizes by its own batch.
    "mean_teacher": (
        {"method__normalization": "apart"},
        [("encode", 1), ("decode", 1), *BOTH],
    ),
    # The U-Net has dropout of its own.
    "unimatch unet": (
        {"model__name": "unet", "model__remat": "all", "data__crop": 32},
        UNIMATCH,
    ),
}


def passes_errors(case: str) -> dict[str, float]:
    """The largest difference between passes in one batch and in a row, by kind."""
    settings, calls = CASES[case]
    method_name = case.partition(" ")[0]
    cfg = tiny.config(f"method={method_name},mpmc=off", train__batch_size=4, **settings)
    parts = tiny.setup(cfg, axis_name=None)
    method = parts.step.method
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[layout.order(len(x), 1, 1)]),
        tiny.batch(0, cfg, method),
    )
    state = init_state(parts, 0)
    to_double = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
    state = state.replace(
        params=to_double(state.params), batch_stats=to_double(state.batch_stats)
    )

    def views(all_params, kind):
        students = {
            each: kind(parts.step.modules[each], params, state.batch_stats[each], True)
            for each, params in all_params.items()
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
        loss = sum(jnp.mean(jnp.sin(each)) for each in logits.values())
        return loss, (stats, logits, taps)

    CALLS.clear()
    results = []
    for kind in (Network, InARow):
        of_kind = jax.grad(functools.partial(views, kind=kind), has_aux=True)
        results.append(jax.jit(of_kind)(state.params))
    assert calls == CALLS, CALLS
    (gradient, found), (expected_gradient, expected) = results
    assert tiny.difference(found[0], state.batch_stats) > 0.01
    assert jax.tree.leaves(found[1])[0].dtype == jnp.float64
    return {
        "statistics": tiny.difference(found[0], expected[0]),
        "maps": tiny.difference(found[1:], expected[1:]),
        "gradient": tiny.difference(gradient, expected_gradient),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_methods_passes_in_one_batch_equal_passes_in_a_row(case):
    errors = run_x64(
        "import json\nfrom tests.methods.test_passes import passes_errors\n"
        f"print(json.dumps(passes_errors({case!r})))"
    )
    assert len(errors) == 3
    assert max(errors.values()) < 1e-10, errors
