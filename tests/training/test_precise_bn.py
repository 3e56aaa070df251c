"""Statistics counted anew: which, from what, and that a run goes on with them."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.experiments.build import init_state
from mpmc_jax.methods import base
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.precise_bn import make_bn_recompute
from mpmc_jax.training.state import PLUGIN
from mpmc_jax.types import Network
from tests.support import tiny


def recounted(cfg, parts, state, seeds, averaged=False, kind="pmap", devices=1):
    """The state after a recompute_bn_stats over the toy batches of `seeds`."""
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel(kind, layout, devices)

    def read():
        for seed in seeds:
            yield parallel.place(tiny.batch(seed, cfg, parts.step.method))

    recompute_bn_stats = make_bn_recompute(parallel, parts.step, read, len(seeds))
    return parallel.fetch(recompute_bn_stats(parallel.replicate(state), averaged))


def settled(parts, params, stats, batches):
    """Of each batch, the running statistics after so many passes over it alone."""

    @jax.jit
    def once(stats, crops):
        images = [parts.step.method.to_unit(each) for each in crops]
        images = parts.step.method.normalize(jnp.concatenate(images))
        network = Network(parts.step.modules["student"], params, stats, train=True)
        _, network = base.full_pass(network, images)
        return network.batch_stats

    for batch in batches:
        crops, passed = [batch.labeled.image, batch.unlabeled.image], stats
        for _ in range(150):  # 0.9^150 < 2e-7
            passed = once(passed, crops)
        yield passed


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("unimatch", {}),
        pytest.param(
            "u2pl",
            {"model__name": "unet", "data__crop": 32, "method__auxiliary_weight": 0.4},
            marks=pytest.mark.full,
        ),
    ],
)
def test_statistics_are_means_over_plain_batches(method, changes):
    cfg = tiny.config(f"method={method},mpmc=recommended", **changes)
    parts = tiny.setup(cfg, None)
    state = init_state(parts, 0)
    found = recounted(cfg, tiny.setup(cfg), state, (3, 4))
    params, stats = state.params["student"], state.batch_stats["student"]
    batches = [tiny.batch(seed, cfg, parts.step.method) for seed in (3, 4)]
    each = settled(parts, params, stats, batches)
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    assert tiny.difference(found.batch_stats["student"], wanted) < 1e-5
    for name in ("params", "ema_params", "ema_batch_stats", "opt_state"):
        assert tiny.difference(getattr(found, name), getattr(state, name)) == 0
    plugin = found.batch_stats[PLUGIN], state.batch_stats[PLUGIN]
    assert tiny.difference(*plugin) == 0


def test_the_teacher_has_its_own_and_old_ones_are_forgotten():
    cfg = tiny.config("method=mean_teacher", method__ema_decay=0.6)
    parts = tiny.setup(cfg)
    state = init_state(parts, 0)
    found = recounted(cfg, parts, state, (3,), averaged=True)
    assert tiny.difference(found.batch_stats, state.batch_stats) == 0
    assert tiny.difference(found.ema_batch_stats, state.ema_batch_stats) > 1e-3
    forgotten = jax.tree.map(lambda x: x + 7, state.ema_batch_stats)
    again = recounted(cfg, parts, state.replace(ema_batch_stats=forgotten), (3,), True)
    assert tiny.difference(again.ema_batch_stats, found.ema_batch_stats) == 0


def test_variances_are_exact_far_from_zero():
    """On a GPU they are computed around a guess of the mean."""
    cfg = tiny.config("method=mean_teacher", model__name="unet", data__crop=32)
    parts = tiny.setup(cfg)
    state = jax.tree.map(np.asarray, init_state(parts, 0))
    stats = state.batch_stats["student"]

    def recount(shift):
        """With another bias before a norm, which its running mean knows."""
        block = "backbone", "stage1", "conv0"
        params = flax.traverse_util.flatten_dict(state.params["student"])
        moved = flax.traverse_util.flatten_dict(stats)
        params[*block, "conv", "bias"] = params[*block, "conv", "bias"] + shift
        moved[*block, "norm", "mean"] = moved[*block, "norm", "mean"] + shift
        changed = state.replace(
            params={**state.params, "student": unflatten(params)},
            batch_stats={**state.batch_stats, "student": unflatten(moved)},
        )
        return recounted(cfg, parts, changed, (3,)).batch_stats["student"]

    unflatten = flax.traverse_util.unflatten_dict
    with compiled_for("gpu"):
        near, far = (recount(np.float32(shift)) for shift in (0, 1000))
    found, wanted = (
        x["backbone"]["stage1"]["conv0"]["norm"]["var"] for x in (far, near)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-2)


def test_statistics_do_not_depend_on_devices_or_mapping():
    cfg = tiny.config("method=unimatch")
    parts = tiny.setup(cfg)
    state = jax.tree.map(np.asarray, init_state(parts, 0))
    one = recounted(cfg, parts, state, (3, 4)).batch_stats
    for kind in ("pmap", "shard_map"):
        four = recounted(cfg, parts, state, (3, 4), kind=kind, devices=4).batch_stats
        assert tiny.difference(four, one) < 1e-5
