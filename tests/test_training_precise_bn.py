"""Statistics counted anew: which, from what, and that a run goes on with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mpmc_jax.methods import base
from mpmc_jax.training import gradient
from mpmc_jax.training.build import init_state
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.precise_bn import make_recount
from mpmc_jax.training.state import PLUGIN
from mpmc_jax.training.step import make_keys
from mpmc_jax.types import Network

U2PL = {"u2pl__low_rank": 1, "u2pl__high_rank": 4}


def layout(cfg):
    train = cfg.train
    return Layout(train.batch_size, train.group_size, train.accumulation)


def recounted(
    cfg, parts, state, seeds, which="student", kind="pmap", devices=1, blank=False
):
    """The state after a recount over the toy batches of `seeds`.

    `blank` makes their unlabeled images black.
    """
    parallel = Parallel(kind, layout(cfg), devices)

    def read():
        for seed in seeds:
            batch = tiny.batch(seed, cfg, parts.method)
            if blank:
                unlabeled = batch.unlabeled.replace(image=0 * batch.unlabeled.image)
                batch = batch.replace(unlabeled=unlabeled)
            yield parallel.place(batch)

    recount = make_recount(parallel, parts.step, read, len(seeds))
    return parallel.fetch(recount(parallel.replicate(state), which))


def composed(name, parts, inputs, state):
    """The images of the labeled images' pass, and the masks of its dropout."""
    if name == "ael":
        return inputs.image, inputs.dropout["labeled"]
    if name == "mean_teacher apart":
        return inputs.image, None
    if name == "unimatch":
        return np.concatenate([inputs.image, inputs.weak]), None
    if name == "augseg":
        teachers, _ = gradient.teaching(parts.step, state)
        targets, _, _ = parts.method.prepare(teachers, inputs, {})
        views = (inputs.image, inputs.strong)
        mixed = parts.method._mix(inputs, targets.injected, *views)
        return np.concatenate([inputs.image, mixed]), None
    group = np.arange(len(inputs.image)).reshape(-1, 2)
    following = np.roll(group, -1, axis=1).reshape(-1)
    other = np.asarray(inputs.weak if name == "u2pl" else inputs.strong)
    mixed = np.where(np.asarray(inputs.box)[..., None], other[following], other)
    return np.concatenate([inputs.image, mixed]), getattr(inputs, "dropout", None)


def settled(parts, params, stats, images, dropout):
    """Running statistics after so many passes over images that only they count."""

    @jax.jit
    def once(stats):
        network = Network(parts.step.modules["student"], params, stats, train=True)
        _, network = base.full_pass(network, jnp.asarray(images), dropout)
        return network.batch_stats

    for _ in range(200):  # 0.9^200 < 1e-9
        stats = once(stats)
    return stats


@pytest.mark.parametrize(
    "name",
    ["mean_teacher", "mean_teacher apart", "unimatch", "augseg", "u2pl", "ael"],
)
def test_statistics_are_means_over_the_passes_of_labeled_images(name):
    changes = {"u2pl__warmup_epochs": 0, "method__auxiliary_weight": 0.0, **U2PL}
    method, _, normalization = name.partition(" ")
    cfg = tiny.config(f"method={method},mpmc=recommended", **changes)
    cfg.method.normalization = normalization or "joint"
    parts = tiny.setup(cfg, None)
    state = init_state(parts, 0)
    found = recounted(cfg, tiny.setup(cfg), state, (3, 4))
    params, stats = state.params["student"], state.batch_stats["student"]
    each = []
    for number, seed in enumerate((3, 4)):
        batch = jax.tree.map(
            lambda x: jnp.asarray(x)[layout(cfg).order(len(x), 1, 1)],
            tiny.batch(seed, cfg, parts.method),
        )
        keys = make_keys(parts.step, state.replace(step=jnp.asarray(number)), batch)
        inputs = parts.method.augment(batch, state.method_state, keys)
        passed = composed(name, parts, inputs, state)
        each.append(settled(parts, params, stats, *passed))
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    got = found.batch_stats["student"]
    if name == "unimatch":
        # Its decoder sees the features with and without dropped channels at once.
        assert tiny.difference(got["decoder"], wanted["decoder"]) > 1e-3
        got, wanted = got["backbone"], wanted["backbone"]
    assert tiny.difference(got, wanted) < 1e-5
    for field in ("params", "ema_params", "ema_batch_stats", "opt_state"):
        assert tiny.difference(getattr(found, field), getattr(state, field)) == 0
    plugin = found.batch_stats[PLUGIN], state.batch_stats[PLUGIN]
    assert tiny.difference(*plugin) == 0


def test_the_teacher_has_its_own_and_old_ones_are_forgotten():
    cfg = tiny.config("method=mean_teacher", method__ema_decay=0.6)
    parts = tiny.setup(cfg)
    state, _ = tiny.run(cfg, 2)
    found = recounted(cfg, parts, state, (3,), "teacher")
    assert tiny.difference(found.batch_stats, state.batch_stats) == 0
    assert tiny.difference(found.ema_batch_stats, state.ema_batch_stats) > 1e-3
    # Draws are those of the recount's batches, not of the step.
    forgotten = jax.tree.map(lambda x: x + 7, state.ema_batch_stats)
    later = state.replace(ema_batch_stats=forgotten, step=state.step + 1)
    again = recounted(cfg, parts, later, (3,), "teacher")
    assert tiny.difference(again.ema_batch_stats, found.ema_batch_stats) == 0


def test_statistics_do_not_depend_on_devices_or_mapping():
    cfg = tiny.config("method=unimatch")
    parts = tiny.setup(cfg)
    state = jax.tree.map(np.asarray, init_state(parts, 0))
    one = recounted(cfg, parts, state, (3, 4)).batch_stats
    for kind in ("pmap", "shard_map"):
        four = recounted(cfg, parts, state, (3, 4), kind=kind, devices=4).batch_stats
        assert tiny.difference(four, one) < 1e-5


def test_parts_of_a_batch_are_normalized_apart_as_in_training():
    found = []
    for parts in (1, 4):
        cfg = tiny.config("method=mean_teacher", train__accumulation=parts)
        state = init_state(tiny.setup(cfg), 0)
        stats = recounted(cfg, tiny.setup(cfg), state, (3,)).batch_stats
        found.append(stats["student"]["backbone"]["stem0"]["norm"])
    whole, apart = found
    np.testing.assert_allclose(apart["mean"], whole["mean"], rtol=1e-4, atol=1e-6)
    # Four images of a part differ less than sixteen.
    assert np.mean(apart["var"] / whole["var"]) < 0.999


def test_during_the_warm_up_only_labeled_images_are_counted():
    cfg = tiny.config("method=u2pl", **U2PL)
    parts = tiny.setup(cfg)
    state = init_state(parts, 0)
    for step, same in ((tiny.STEPS_PER_EPOCH, True), (tiny.STEPS_PER_EPOCH + 1, False)):
        state = state.replace(step=jnp.asarray(step))
        shown, hidden = (
            recounted(cfg, parts, state, (3,), blank=blank).batch_stats
            for blank in (False, True)
        )
        assert (tiny.difference(shown, hidden) == 0) == same
