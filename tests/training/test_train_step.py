"""The step: what it updates, what it refuses, how often it compiles."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpmc_jax.experiments.build import state_shape
from mpmc_jax.plugins.base import Identity, PluginLosses
from mpmc_jax.random_keys import key_of_name
from mpmc_jax.training.optimizer import Schedule, build_optimizer
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.state import PLUGIN
from mpmc_jax.training.train_step import (
    IN_ORDER,
    _checked_trees,
    _update_average,
    make_keys,
    make_step,
    make_step_info,
)
from mpmc_jax.training.trees import all_finite
from tests.support import tiny

# One program for the tests of the mean teacher.
TEACHER = {"method__rampup": 2, "method__threshold": 0.0, "method__ema_decay": 0.6}


@pytest.fixture(scope="module")
def unimatch():
    cfg = tiny.config("method=unimatch,mpmc=recommended", method__threshold=0.4)
    return cfg, *tiny.run(cfg, 3)


def test_losses_are_finite_and_named(unimatch):
    _, state, metrics = unimatch
    names = {"loss", "loss_supervised", "loss_s1", "loss_s2", "loss_fp", "confident"}
    names |= {"loss_patch_labeled", "loss_patch_unlabeled", "lambda_mean"}
    names |= {"confident_weak"}
    names |= {"patch_hamming", "grad_norm", "lr", "unlabeled_weight"}
    for values in metrics:
        assert names == set(values.values)
        assert all(np.isfinite(v) for v in values.values.values())
        assert not values.skipped
        assert 0 < values.values["confident"] < 1
        # The method's 1/2, alpha = 1/4, the coefficients 1 + 1 + 2, lambda's mean 1.
        np.testing.assert_allclose(values.values["unlabeled_weight"], 0.5, rtol=1e-6)
    assert int(state.step) == 3


@dataclasses.dataclass(frozen=True)
class Probe(Identity):
    """A plug-in with two metrics: the mean row of class 1's pixels, and nothing."""

    def losses(self, variables, supervised, *args, **kwargs):
        hit = supervised[0].label == 1
        row = jnp.arange(hit.shape[1])[None, :, None]
        zero = jnp.zeros((), jnp.int32)
        pair = (jnp.sum(jnp.where(hit, row, 0)), jnp.sum(hit))
        return PluginLosses({}, {"row": pair, "nothing": (zero, zero)}, {})


def test_a_mean_is_over_all_that_devices_and_micro_batches_counted():
    """Not the mean of their means; NaN where nothing was counted."""
    cfg = tiny.config("method=supervised", train__accumulation=2)

    def probed(parts):
        step = dataclasses.replace(parts.step, plugin=Probe())
        return dataclasses.replace(parts, step=step)

    _, metrics = tiny.run(cfg, 1, devices=2, change=probed)
    hit = tiny.batch(0, cfg, tiny.setup(cfg).step.method).labeled.label == 1
    rows = np.nonzero(hit)[1]
    np.testing.assert_allclose(metrics[0].values["row"], rows.mean(), rtol=1e-6)
    means = [np.nonzero(half)[1].mean() for half in np.split(hit, 2)]
    assert abs(np.mean(means) - rows.mean()) > 0.01
    assert np.isnan(metrics[0].values["nothing"])


def test_shares_of_classes_are_those_of_the_whole_batch(unimatch):
    cfg, _, metrics = unimatch
    label = tiny.batch(0, cfg, tiny.setup(cfg).step.method).labeled.label
    expected = [np.mean(label[label != 255] == c) for c in range(tiny.CLASSES)]
    np.testing.assert_allclose(metrics[0].shares["label"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics[0].shares["pseudo"].sum(), 1, rtol=1e-6)


def test_the_weight_of_the_unlabeled_loss_grows_and_then_stays():
    cfg = tiny.config("method=mean_teacher", method__rampup=4, mpmc__alpha=0.5)
    step = tiny.setup(cfg).step
    found = [float(step.alpha_at(jnp.asarray(t))) for t in (0, 1, 2, 3, 4, 5, 400)]
    expected = [0.5 * np.exp(-5 * (1 - t / 4) ** 2) for t in range(4)] + [0.5] * 3
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    published = tiny.config("method=unimatch")
    assert tiny.setup(published).step.alpha_at(jnp.asarray(3)) == 0.25
    preset = tiny.config("method=mean_teacher", train__steps=307)
    assert tiny.setup(preset).step.rampup == 30


def test_a_ramp_up_weighs_the_unlabeled_loss():
    _, metrics = tiny.run(tiny.config("method=mean_teacher", **TEACHER), 3)
    for number, each in enumerate(metrics):
        values = each.values
        weight = 0.25 * np.exp(-5 * max(1 - number / 2, 0) ** 2)
        np.testing.assert_allclose(values["unlabeled_weight"], weight, rtol=1e-5)
        total = values["loss_supervised"] + weight * values["loss_unlabeled"]
        np.testing.assert_allclose(values["loss"], total, rtol=1e-5)
        assert values["loss_unlabeled"] > 0


def test_a_teacher_that_normalizes_by_the_batch_reads_no_running_statistics():
    found = []
    for normalization in ("apart", "joint"):
        changes = {**TEACHER, "method__normalization": normalization}
        cfg = tiny.config("method=mean_teacher", **changes)
        state = jax.tree.map(np.asarray, tiny.init_state(tiny.setup(cfg), 0))
        stale = jax.tree.map(lambda x: x + 3, state.ema_batch_stats)
        other = state.replace(ema_batch_stats=stale)
        runs = [tiny.run(cfg, 1, state=each) for each in (state, other)]
        losses = [metrics[0].values["loss_unlabeled"] for _, metrics in runs]
        found.append(losses[0] == losses[1])
    assert found == [True, False]


@pytest.mark.full
def test_mean_teacher_apart_and_without_weight_is_supervision():
    changes = {"method__normalization": "apart", "mpmc__alpha": 0.0}
    found, _ = tiny.run(tiny.config("method=mean_teacher", **changes), 2)
    wanted, _ = tiny.run(tiny.config("method=supervised"), 2)
    assert tiny.difference(found.params, wanted.params) < 1e-5
    # Running statistics follow the strong views as well.
    assert tiny.difference(found.batch_stats, wanted.batch_stats) > 1e-3


def test_every_parameter_moves(unimatch):
    cfg, state, _ = unimatch
    start = tiny.init_state(tiny.setup(cfg), cfg.seed)
    assert PLUGIN in state.params
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, start.params)
    ):
        assert moved, jax.tree_util.keystr(path)


def test_mean_teacher_averages_parameters_and_statistics():
    cfg = tiny.config("method=mean_teacher", **TEACHER)
    first, _ = tiny.run(cfg, 1)
    second, _ = tiny.run(cfg, 1, state=first)
    # decay at t is min(1 - 1/(t+1), 0.6): a copy first, then one half.
    chex.assert_trees_all_close(first.ema_params, first.params)
    chex.assert_trees_all_close(first.ema_batch_stats, first.batch_stats)
    half = jax.tree.map(lambda a, b: (a + b) / 2, first.params, second.params)
    chex.assert_trees_all_close(second.ema_params, half, rtol=1e-6, atol=1e-7)
    half = jax.tree.map(lambda a, b: (a + b) / 2, first.batch_stats, second.batch_stats)
    chex.assert_trees_all_close(second.ema_batch_stats, half, rtol=1e-6, atol=1e-7)


def test_an_average_for_evaluation_only_changes_nothing_else():
    plain = tiny.run(tiny.config("method=supervised"), 2)[0]
    kept = tiny.run(tiny.config("method=supervised", method__ema_decay=0.25), 2)[0]
    assert plain.ema_params is None
    chex.assert_trees_all_equal(kept.params, plain.params)
    # Decays 0 and 0.25: a copy of the first state, then 3/4 of the second.
    assert tiny.difference(kept.ema_params, kept.params) > 1e-6


@pytest.mark.full
def test_the_teacher_alone_computes_in_its_dtype():
    values = {}
    for dtype in ("", "bfloat16"):
        cfg = tiny.config(
            "method=mean_teacher",
            model__teacher_dtype=dtype,
            method__threshold=0.0,
        )
        parts = tiny.setup(cfg)
        assert parts.step.teacher_modules["student"].dtype == (dtype or "float32")
        assert parts.step.modules["student"].dtype == "float32"
        state, metrics = tiny.run(cfg, 1)
        assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
        values[dtype] = metrics[0].values
    exact, rounded = values[""], values["bfloat16"]
    # The supervised term has no teacher; some of its nearly even votes turn elsewhere.
    assert rounded["loss_supervised"] == exact["loss_supervised"]
    loss = "loss_unlabeled"
    assert rounded[loss] != exact[loss]
    np.testing.assert_allclose(rounded[loss], exact[loss], rtol=1e-2)


def test_a_step_that_is_not_finite_is_skipped_and_so_are_those_after_it():
    cfg = tiny.config("method=supervised")
    parts = tiny.setup(cfg)
    state = tiny.init_state(parts, 0)
    kernel = state.params["student"]["decoder"]["classifier"]["kernel"]
    broken = kernel.at[(0,) * kernel.ndim].set(np.nan)
    params = jax.tree.map(lambda x: broken if x is kernel else x, state.params)
    poisoned = state.replace(params=params)
    after, metrics = tiny.run(cfg, 2, state=poisoned)
    assert metrics[0].skipped and metrics[0].failed_check == "loss_supervised"
    assert int(after.step) == 0
    chex.assert_trees_all_equal(after, poisoned)
    # A sound state that waits for batch 0 does not take batch 1.
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel("pmap", layout, 1)
    step = parallel.compile(make_step(parts.step))
    late = parallel.replicate(make_step_info(1))
    placed = parallel.place(tiny.batch(1, cfg, parts.step.method))
    out, skipped = step(parallel.replicate(state), placed, late)
    assert parallel.fetch(skipped).skipped
    assert parallel.fetch(skipped).failed_check == IN_ORDER
    chex.assert_trees_all_equal(parallel.fetch(out).params, state.params)


@pytest.mark.parametrize(
    ("changes", "scale", "name"),
    [
        # The heads' rate times the gradient exceeds float32's range.
        (
            {"optimizer__lr": 10.0, "optimizer__head_multiplier": 1e38},
            1,
            "an updated parameter",
        ),
        # So does the variance, and batch norm divides what it is of by infinity.
        ({}, 1e25, "an updated batch-norm statistic"),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_though_its_loss_is(
    changes, scale, name
):
    cfg = tiny.config("method=supervised", **changes)
    state = tiny.init_state(tiny.setup(cfg), 0)
    kernel = state.params["student"]["backbone"]["stem0"]["conv"]["kernel"]
    params = jax.tree.map(lambda x: x * scale if x is kernel else x, state.params)
    state = state.replace(params=params)
    after, (metrics, _) = tiny.run(cfg, 2, state=state)
    assert np.isfinite(metrics.values["loss"])
    assert np.isfinite(metrics.values["grad_norm"])
    assert metrics.skipped and metrics.failed_check == name
    chex.assert_trees_all_equal(after, jax.tree.map(np.asarray, state))


def test_everything_that_a_step_moves_is_looked_at():
    finite = {"bank": jnp.ones(3, jnp.bfloat16), "place": jnp.ones(2, jnp.int32)}
    assert all_finite(finite) and all_finite({}) and all_finite({"n": jnp.arange(2)})
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite(finite | {"bank": finite["bank"].at[1].set(value)})
    state = state_shape(tiny.setup(tiny.config("method=u2pl")))
    looked_at = sum(
        len(jax.tree.leaves(tree)) for tree in _checked_trees(state).values()
    )
    implied = jax.tree.leaves((state.opt_state, state.ema_params))
    rest = (state.step, state.key)
    assert looked_at == len(jax.tree.leaves(state)) - len(implied) - len(rest)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_group_draws_the_same_whatever_the_devices(devices):
    """Record r belongs to group r mod G, and a group's key to it alone."""
    cfg = tiny.config("method=unimatch", train__batch_size=8, train__group_size=2)
    parts = tiny.setup(cfg)
    state = tiny.init_state(parts, 0)
    parallel = Parallel("pmap", Layout(8, 2, 1), devices)

    def draw(batch):
        keys = make_keys(parts.step, state, batch)
        return batch.labeled.batch_index, jax.random.key_data(keys.groups("coin"))

    placed = parallel.place(tiny.batch(0, cfg, parts.step.method))
    records, drawn = jax.pmap(draw, devices=parallel.devices)(placed)
    members = np.asarray(records).reshape(4, 2) % 4
    np.testing.assert_array_equal(members, members[:, :1].repeat(2, 1))
    assert sorted(members[:, 0]) == [0, 1, 2, 3]
    root = jax.random.fold_in(
        key_of_name(jax.random.wrap_key_data(state.key), "group/coin"), 0
    )
    expected = [
        jax.random.key_data(jax.random.fold_in(root, group)) for group in members[:, 0]
    ]
    np.testing.assert_array_equal(np.asarray(drawn).reshape(4, -1), expected)


@pytest.mark.parametrize(
    "kind", ["pmap", pytest.param("shard_map", marks=pytest.mark.full)]
)
def test_one_compilation_and_no_transfer_in_the_step(kind):
    cfg = tiny.config("method=supervised")
    parts = tiny.setup(cfg)
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel(kind, layout)
    chex.clear_trace_counter()
    step = parallel.compile(chex.assert_max_traces(make_step(parts.step), n=1))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
    )
    state = parallel.replicate(tiny.init_state(parts, 0))
    for number in range(3):
        placed = parallel.place(tiny.batch(number, cfg, parts.step.method))
        order = parallel.replicate(make_step_info(number))
        if number == 1:
            compiled.clear()
        with jax.transfer_guard("disallow"):
            state, _ = step(state, placed, order)
    jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]
    assert int(parallel.fetch(state).step) == 3


@pytest.mark.full
@pytest.mark.parametrize("method", ["unimatch", "augseg", "u2pl", "ael"])
def test_a_step_asks_the_host_for_nothing(method):
    """The guard above sees arguments alone; the program must not talk either."""
    cfg = tiny.config(f"method={method},mpmc=recommended", train__devices=1)
    parts = tiny.setup(cfg)
    parallel = Parallel("pmap", Layout(cfg.train.batch_size, 2, 1), 1)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state_shape(parts)
    )
    placed = parallel.place(tiny.batch(0, cfg, parts.step.method))
    order = parallel.replicate(make_step_info(0))
    step = parallel.compile(make_step(parts.step))
    text = step.lower(state, placed, order).as_text().lower()
    assert "stablehlo.convolution" in text
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text


def test_a_teacher_with_statistics_of_its_own_keeps_them_and_averages_the_plugins():
    config = types.SimpleNamespace(
        method=types.SimpleNamespace(average_decays=lambda step, epoch: (0.75, None)),
        modules={"student": None},
        steps_per_epoch=1,
    )
    both = {"student": jnp.zeros(2), PLUGIN: jnp.zeros(2)}
    ones, twos = (jax.tree.map(lambda x, n=n: x + n, both) for n in (1, 2))
    state = types.SimpleNamespace(step=0, ema_params=both, ema_batch_stats=both)
    carry = types.SimpleNamespace(ema_batch_stats=twos, batch_stats=ones)
    params, stats = _update_average(config, state, carry, ones)
    chex.assert_trees_all_close(params, jax.tree.map(lambda x: x / 4, ones))
    np.testing.assert_allclose(stats["student"], 2)
    np.testing.assert_allclose(stats[PLUGIN], 0.25)


def test_optimizer_is_torch_sgd():
    rng = np.random.default_rng(0)
    params = {"backbone": {"w": rng.normal(size=3)}, "head": {"w": rng.normal(size=3)}}
    schedule = Schedule(lr=0.1, steps=10, power=0.9, lag=1)
    optimizer = build_optimizer(
        schedule, head_multiplier=10.0, momentum=0.9, weight_decay=1e-2
    )
    state = optimizer.init(params)
    expected = jax.tree.map(np.copy, params)
    buffer = jax.tree.map(np.zeros_like, params)
    now = params
    for t in range(4):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        updates, state = optimizer.update(grads, state, now)
        now = optax.apply_updates(now, updates)
        rate = 0.1 * (1 - max(t - 1, 0) / 10) ** 0.9
        for part, factor in (("backbone", 1), ("head", 10)):
            gradient = grads[part]["w"] + 1e-2 * expected[part]["w"]
            buffer[part]["w"] = 0.9 * buffer[part]["w"] + gradient
            expected[part]["w"] = (
                expected[part]["w"] - factor * rate * buffer[part]["w"]
            )
    chex.assert_trees_all_close(now, expected, rtol=1e-5)


def test_adamw_is_torch_s_with_two_rates():
    """Against the update rule written out, decay behind the moments."""
    rng = np.random.default_rng(0)
    params = {
        name: {"w": rng.normal(size=(3, 2)).astype(np.float32)}
        for name in ("backbone", "head")
    }
    schedule = Schedule(lr=0.1, steps=10, power=0.9)
    optimizer = build_optimizer(
        schedule,
        name="adamw",
        head_multiplier=10.0,
        weight_decay=1e-2,
        betas=(0.8, 0.95),
        eps=1e-3,
    )
    state, now = optimizer.init(params), params
    expected = jax.tree.map(np.copy, params)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t in range(4):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        updates, state = optimizer.update(grads, state, now)
        now = optax.apply_updates(now, updates)
        for part, factor in (("backbone", 1), ("head", 10)):
            gradient, rate = grads[part]["w"], factor * 0.1 * (1 - t / 10) ** 0.9
            first[part]["w"] = 0.8 * first[part]["w"] + 0.2 * gradient
            second[part]["w"] = 0.95 * second[part]["w"] + 0.05 * gradient**2
            mean = first[part]["w"] / (1 - 0.8 ** (t + 1))
            root = np.sqrt(second[part]["w"] / (1 - 0.95 ** (t + 1)))
            expected[part]["w"] = expected[part]["w"] - rate * (
                mean / (root + 1e-3) + 1e-2 * expected[part]["w"]
            )
    chex.assert_trees_all_close(now, expected, rtol=1e-5)


def test_a_frozen_encoder_has_no_update_and_no_state():
    params = {name: {"w": np.ones(3, np.float32)} for name in ("backbone", "head")}
    rules = [
        build_optimizer(
            Schedule(lr=0.1, steps=10),
            name=name,
            head_multiplier=10.0,
            weight_decay=1e-2,
            freeze="encoder",
        )
        for name in ("sgd", "adamw")
    ]
    for rule in rules:
        updates, state = rule.update(params, rule.init(params), params)
        np.testing.assert_array_equal(updates["backbone"]["w"], 0)
        assert np.all(updates["head"]["w"] < 0)
        kept = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
        assert {x.shape for x in kept} == {(3,)} and len(kept) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer__name": "adam"}, "optimizer.name='adam' is unknown; .*'adamw'"),
        ({"optimizer__betas": (0.9, 1.0)}, r"optimizer.betas=\(0.9, 1.0\): both"),
    ],
)
def test_an_optimizer_that_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.setup(tiny.config("method=supervised", **change))


@pytest.mark.full
def test_a_run_learns_with_adamw():
    cfg = tiny.config(
        "method=supervised", optimizer__name="adamw", optimizer__head_multiplier=1.0
    )
    _, metrics = tiny.run(cfg, 6)
    losses = [float(each.values["loss_supervised"]) for each in metrics]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("devices,processes", [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("parts", [1, 2])
def test_layout_keeps_groups_whole_and_micro_batches_alike(devices, processes, parts):
    batch, group = 16, 2
    layout = Layout(batch, group, parts)
    layout.check(devices, processes)
    groups = batch // group
    seen = set()
    for process in range(processes):
        records = np.arange(process, batch, processes)
        rows = records[layout.order(len(records), devices, processes)]
        local = rows.reshape(devices // processes, parts, -1, group)
        for device in local:
            for part, of_part in enumerate(device):
                for members in of_part:
                    assert len(set(members % groups)) == 1
                    assert (members[0] % groups) // (groups // parts) == part
        seen |= set(rows)
    assert seen == set(range(batch))


@pytest.mark.parametrize(
    "batch,group,parts,devices,message",
    [
        (7, 2, 1, 1, "not a multiple of train.group_size=2"),
        (8, 2, 1, 3, "do not divide over 3 devices"),
        (8, 4, 1, 4, "multiple of 16"),
        (8, 2, 2, 4, "train.accumulation=2"),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch, group, parts, devices, message):
    with pytest.raises(ValueError, match=message):
        Layout(batch, group, parts).check(devices, 1)


@pytest.mark.full
def test_bfloat16_computes_in_it_and_keeps_float32():
    cfg = tiny.config("method=unimatch,mpmc=recommended", model__dtype="bfloat16")
    state, metrics = tiny.run(cfg, 2)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)):
        assert leaf.dtype in (np.float32, np.int32)
    for values in (m.values for m in metrics):
        # NaN is the mean over no pixel: none is confident so early.
        assert values["confident"] == 0
        empty = {name for name, value in values.items() if not np.isfinite(value)}
        assert empty == {"lambda_mean", "unlabeled_weight"}
    narrow = metrics[0].values["loss"]
    wide = tiny.run(tiny.config("method=unimatch,mpmc=recommended"), 1)[1][0]
    assert narrow != wide.values["loss"]
    np.testing.assert_allclose(narrow, wide.values["loss"], rtol=0.05)
