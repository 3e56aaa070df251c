"""FixMatch and CPS against slow and obvious NumPy; UniMatch V2's masks and settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.augmentation import dropout, mixing
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.methods import cps, fixmatch, mean_teacher, unimatch, unimatch_v2
from mpmc_jax.training import objective
from mpmc_jax.training.train_step import make_keys
from tests.support import tiny
from tests.support.linear_network import cross_entropy, network, scores, softmax, step

GROUPS, MEMBERS, SIZE, CLASSES = 2, 4, (6, 8), 4
EXAMPLES = GROUPS * MEMBERS
ALPHA = 0.25


def _arrays(seed):
    """Images, labels, real pixels and boxes by name, of all kinds that are needed."""
    rng = np.random.default_rng(seed)
    shape = (EXAMPLES, *SIZE)

    def box():
        mask = np.zeros(shape, bool)
        for each in mask:
            top, left = rng.integers(0, SIZE[0] - 1), rng.integers(0, SIZE[1] - 1)
            each[top : top + rng.integers(1, 6), left : left + rng.integers(1, 8)] = 1
        return mask

    real = np.ones(shape, bool)
    real[::3, 4:] = False
    label = np.where(rng.random(shape) < 0.2, 255, rng.integers(0, CLASSES, shape))
    found = {"label": label, "real": real, "partner_real": real[::-1].copy()}
    for name in ("image", "weak", "strong1", "strong2", "partner"):
        found[name] = rng.normal(size=(*shape, 3)).astype(np.float32)
    for name in ("partner_strong1", "partner_strong2"):
        found[name] = rng.normal(size=(*shape, 3)).astype(np.float32)
    return found | {"box1": box(), "box2": box()}


def _reversed(value):
    grouped = value.reshape(GROUPS, MEMBERS, *value.shape[1:])
    return grouped[:, ::-1].reshape(value.shape)


def _paste(box, inside, outside):
    return np.where(box.reshape(box.shape + (1,) * (inside.ndim - 3)), inside, outside)


def _mean(values, where):
    return (values * where).sum() / where.sum()


def _supervised(logits, label):
    return _mean(cross_entropy(logits, label), label != 255)


def _unlabeled(logits, confidence, label, real, threshold):
    kept = (confidence >= threshold) & real
    return (cross_entropy(logits, label) * kept).sum() / real.sum()


def _pseudo(logits):
    p = softmax(logits)
    return p.max(-1), p.argmax(-1)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), threshold=st.sampled_from([0.0, 0.5, 0.9]))
def test_fixmatch_with_an_average(seed, threshold):
    x = _arrays(seed)
    inputs = mean_teacher.Inputs(
        image=x["image"],
        label=x["label"],
        weak=x["weak"],
        strong=x["strong1"],
        real=x["real"],
        mask=x["box1"],
    )
    method = fixmatch.AverageFixMatch(group_size=MEMBERS, threshold=threshold)
    student, teacher = network(1, CLASSES, train=True), network(2, CLASSES, train=False)
    value, *_ = step(
        method, MEMBERS, student, teacher, jax.tree.map(jnp.asarray, inputs), {}
    )
    confidence, label = _pseudo(scores(teacher, x["weak"]))
    box = x["box1"]
    unlabeled = _unlabeled(
        scores(student, _paste(box, _reversed(x["strong1"]), x["strong1"])),
        _paste(box, _reversed(confidence), confidence),
        _paste(box, _reversed(label), label),
        _paste(box, _reversed(x["real"]), x["real"]),
        threshold,
    )
    supervised = _supervised(scores(student, x["image"]), x["label"])
    np.testing.assert_allclose(value, (supervised + unlabeled) / 2, rtol=2e-5)


def _unimatch_inputs(x, views, perturbed):
    ones = {"layer1": np.ones((2 * EXAMPLES, 1, 1, 3), np.float32)}
    numbers = range(1, views + 1)
    inputs = unimatch.Inputs(
        image=x["image"],
        label=x["label"],
        weak=x["weak"],
        real=x["real"],
        strong=tuple(x[f"strong{i}"] for i in numbers),
        partner_weak=x["partner"],
        partner_real=x["partner_real"],
        partner_strong=tuple(x[f"partner_strong{i}"] for i in numbers),
        masks=tuple(x[f"box{i}"] for i in numbers),
        perturbation=ones if perturbed else {},
    )
    return jax.tree.map(jnp.asarray, inputs)


class OneView(unimatch.UniMatch):
    """UniMatch with its second strong view at weight 0."""

    strong_coefficients = {"s1": 1 / ALPHA, "s2": 0.0}


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_fixmatch_is_unimatch_without_two_of_its_views(threshold):
    x = _arrays(3)
    student, teacher = network(1, CLASSES, train=True), network(1, CLASSES, train=False)
    one = fixmatch.FixMatch(threshold=threshold)
    inputs = _unimatch_inputs(x, 1, perturbed=False)
    value, (terms, _), _, _ = step(one, MEMBERS, student, teacher, inputs, {})
    assert terms.keys() == {"supervised", "s1", "auxiliary"}
    np.testing.assert_allclose(
        value, (terms["supervised"] + terms["s1"]) / 2, rtol=1e-6
    )
    whole = OneView(perturbed_taps=(("layer1", 3),), threshold=threshold)
    inputs = _unimatch_inputs(x, 2, perturbed=True)
    other, (more, _), _, _ = step(whole, MEMBERS, student, teacher, inputs, {})
    for name in ("supervised", "s1"):
        np.testing.assert_allclose(more[name], terms[name], rtol=1e-6)
    np.testing.assert_allclose(value, other - ALPHA * more["fp"], rtol=1e-5)


def _cps_inputs(x, mixed):
    return cps.Inputs(
        image=x["image"],
        label=x["label"],
        labeled_real=x["partner_real"],
        weak=x["weak"],
        real=x["real"],
        partner=cps.Partner(x["partner"], x["partner_real"], x["box1"])
        if mixed
        else None,
        network_dropout_keys={
            f"{network}/{name}": None
            for network in ("first", "second")
            for name in ("labeled", "unlabeled", "partner", "mixed")
        },
    )


@functools.partial(jax.jit, static_argnums=0)
def _cps_step(method, first, second, inputs):
    def loss(students):
        frozen = {name: net.frozen() for name, net in students.items()}
        outputs = method.views(students, frozen, inputs, None, {})
        counts = {k: r.valid.sum() for k, r in method.regions(inputs).items()}
        total, terms = objective.combine(
            outputs,
            outputs.views,
            {},
            Reduction(None, counts),
            objective.SupervisedLoss("ce", MEMBERS, 0.7, 10),
            scale=method.scale,
            alpha=ALPHA,
        )
        stats = {name: net.batch_stats for name, net in outputs.students.items()}
        return total, (terms, stats)

    students = {"first": first, "second": second}
    return jax.value_and_grad(loss, has_aux=True)(students)


@pytest.mark.parametrize("method", [cps.CPS(weight=1.5), cps.PlainCPS(weight=6.0)])
def test_cps(method):
    x = _arrays(4)
    mixed = type(method) is cps.CPS
    inputs = jax.tree.map(jnp.asarray, _cps_inputs(x, mixed))
    nets = [network(seed, CLASSES, train=True) for seed in (1, 2)]
    (value, (_, stats)), gradient = _cps_step(method, *nets, inputs)
    if mixed:
        images = _paste(x["box1"], x["partner"], x["weak"])
        labels = [
            _paste(x["box1"], scores(n, x["partner"]), scores(n, x["weak"])).argmax(-1)
            for n in nets
        ]
    else:
        images = np.concatenate([x["image"], x["weak"]])
        labels = [scores(n, images).argmax(-1) for n in nets]
    # Every pixel counts, padding too.
    expected = sum(_supervised(scores(n, x["image"]), x["label"]) for n in nets)
    for net, label in zip(nets, labels[::-1], strict=True):
        cross = cross_entropy(scores(net, images), label).mean()
        expected = expected + method.weight * cross
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    # Every pass moves the statistics of batch norm.
    assert stats == dict.fromkeys(("first", "second"), 4 if mixed else 2)
    # The networks exchanged, the gradients are.
    (other, _), mirrored = _cps_step(method, *nets[::-1], inputs)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for name, opposite in (("first", "second"), ("second", "first")):
        np.testing.assert_allclose(
            gradient[name].matrix, mirrored[opposite].matrix, rtol=1e-5, atol=1e-7
        )


def test_xor_masks():
    size, keys = 64, jax.random.split(jax.random.key(0), 200)
    masks = np.asarray(mixing.draw_xor_masks(keys, size))
    for key, mask in zip(keys[:20], masks, strict=False):
        q, u, y, x = np.asarray(jax.random.uniform(key, (4, 3), jnp.float32))
        expected = np.zeros((size, size), bool)
        for i in range(3):
            share = 0.25 + 0.25 * q[i]
            height = share ** u[i]
            rows = round(float(height * 3**-0.5 * size))
            columns = round(float(share / height * 3**-0.5 * size))
            top = round(float((size - rows) * y[i]))
            left = round(float((size - columns) * x[i]))
            box = (slice(top, top + rows), slice(left, left + columns))
            expected[box] = ~expected[box]
        np.testing.assert_array_equal(mask, expected)
    # Three boxes of a mean share of 1/8, some of which overlap and cancel.
    assert 0.25 < masks.mean() < 3 / 8


@functools.partial(jax.jit, static_argnames=("groups", "members"))
def _kept_and_masks(key, groups, members):
    keys = jax.random.split(key, groups)
    kept = dropout.draw_kept(keys, members)
    return kept, *dropout.complementary_masks(keys, 16, kept)


@given(
    seed=st.integers(0, 2**31 - 1), groups=st.integers(1, 3), members=st.integers(1, 5)
)
@settings(max_examples=15, deadline=None)
def test_masks_complement_each_other(seed, groups, members):
    kept, first, second = _kept_and_masks(jax.random.key(seed), groups, members)
    assert (kept.sum(1) == members // 2).all()
    assert first.shape == second.shape == (groups * members, 1, 1, 16)
    np.testing.assert_array_equal(first + second, 2)
    whole = np.asarray(kept).ravel()
    assert (np.asarray(first)[whole] == 1).all()
    assert np.isin(np.asarray(first)[~whole], (0, 2)).all()


def test_taps_of_one_width_share_a_mask_whatever_the_devices():
    cfg = tiny.config("method=unimatch_v2")
    parts = tiny.setup(cfg)
    method = parts.step.method
    method = unimatch_v2.UniMatchV2(
        group_size=2, perturbed_taps=(("a", 8), ("b", 8), ("c", 16))
    )
    state = tiny.init_state(parts, 0)
    whole = tiny.batch(0, cfg, parts.step.method)

    @jax.jit
    def perturbation(rows):
        return method.augment(rows, {}, make_keys(parts.step, state, rows)).perturbation

    found = []
    for part in range(2):
        rows = jax.tree.map(lambda x, part=part: np.split(x, 2)[part], whole)
        found.append(perturbation(rows))
    masks = {
        tap: np.concatenate(
            [half for each in found for half in [np.split(each[tap], 2)[0]]]
        )
        for tap in "abc"
    }
    np.testing.assert_array_equal(masks["a"], masks["b"])
    assert masks["c"].shape[-1] == 16
    once = perturbation(whole)
    np.testing.assert_array_equal(masks["a"], np.split(once["a"], 2)[0])


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("unimatch_v2", {"train__group_size": 1}, "group_size=1 the middle image"),
        ("unimatch_v2", {"method__ema_decay": 0.0}, "method.ema_decay=0.0 is not"),
        ("cps", {"method__ema_decay": 0.9}, "ema_decay=0.9: cps keeps no average"),
        ("cps", {"cps__weight": 0.0}, "cps.weight=0.0: must be positive"),
        (
            "cps",
            {"method__cutmix": False, "cps__plain_weight": 0.0},
            "cps.plain_weight=0.0: must be positive",
        ),
        ("fixmatch", {"fixmatch__teacher": "ema"}, "fixmatch.teacher='ema' is unknown"),
        (
            "fixmatch",
            {"fixmatch__teacher": "average"},
            "fixmatch's teacher is an average, but method.ema_decay=0.0",
        ),
        ("fixmatch", {"method__cutmix": False}, "is for mean_teacher, cps; fixmatch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(argument, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.setup(tiny.config(f"method={argument}", **changes))


@pytest.mark.parametrize(("cutmix", "weight"), [(True, 1.0), (False, 1.5)])
def test_both_forms_of_cps_have_their_published_weight(cutmix, weight):
    cfg = tiny.config("method=cps", method__cutmix=cutmix)
    assert tiny.setup(cfg).step.method.weight == weight


@pytest.mark.full
def test_the_networks_of_plain_cps_have_heads_of_their_own():
    cfg = tiny.config("method=cps,mpmc=recommended", method__cutmix=False)
    state, metrics = tiny.run(cfg, 2)
    assert set(state.params) == {"first", "second", "plugin"}
    values = metrics[-1].values
    assert all(np.isfinite(value) for value in values.values())
    assert values["loss_unlabeled_first"] != values["loss_unlabeled_second"]
    heads = state.params["plugin"]
    assert set(heads) == {"first", "second"}
    assert tiny.difference(heads["first"], heads["second"]) > 1e-3


@pytest.mark.full
def test_fixmatch_with_an_average_takes_a_step():
    changes = {"fixmatch__teacher": "average", "method__ema_decay": 0.996}
    state, (metrics,) = tiny.run(tiny.config("method=fixmatch", **changes), 1)
    assert np.isfinite(metrics.values["loss"]) and not metrics.skipped
    assert state.ema_params is not None
