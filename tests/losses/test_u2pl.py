"""U2PL's two losses against the numbers of its release, and against slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.losses import pixel_cross_entropy
from mpmc_jax.losses.contrastive import Draws, Rings, info_nce, prototypes
from mpmc_jax.losses.sampling import nth_true
from mpmc_jax.methods.pseudo_labels import entropy
from mpmc_jax.methods.u2pl import sets as u2pl_sets
from mpmc_jax.methods.u2pl.entropy import entropy_percentile, kept_weights
from tests.support import golden
from tests.support.x64 import run_x64

_PUSH = jax.jit(Rings.push, static_argnums=0)


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def percentile_weights(teacher, label, percent):
    known = label != 255
    uncertain = entropy(teacher)
    limit = entropy_percentile(uncertain, known, percent)
    return kept_weights(uncertain, known, limit)


def unsupervised(student, teacher, label, percent):
    weight = percentile_weights(teacher, label, percent)
    return jnp.sum(weight * pixel_cross_entropy(student, label))


def test_unsupervised_loss_is_the_released_one():
    cases = 0
    for path in golden.golden_files("u2pl_unsupervised*.npz"):
        arrays = np.load(path)
        for i in range(sum(name.startswith("loss_") for name in arrays.files)):
            student, teacher = (
                channels_last(arrays[f"{who}_logits_{i}"])
                for who in ("student", "teacher")
            )
            label = jnp.asarray(arrays[f"pseudo_labels_{i}"])
            percent = jnp.asarray(arrays[f"keep_percent_{i}"])
            value, gradient = jax.jit(jax.value_and_grad(unsupervised))(
                student, teacher, label, percent
            )
            np.testing.assert_allclose(value, arrays[f"loss_{i}"], rtol=1e-5)
            norm = np.linalg.norm(gradient)
            np.testing.assert_allclose(norm, arrays[f"grad_norm_{i}"], rtol=1e-5)
            cases += 1
    assert cases


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), percent=st.floats(0, 100))
def test_percentile_weights_are_the_oracles(seed, percent):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (2, 5, 6, 4)).astype(np.float32)
    label = np.where(rng.random((2, 5, 6)) < 0.2, 255, rng.integers(0, 4, (2, 5, 6)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    h = -(p * np.log(p + 1e-10)).sum(-1)
    found = np.asarray(percentile_weights(jnp.asarray(logits), label, percent))
    limit = np.percentile(h[label != 255], percent)
    near = np.abs(h - limit) < 1e-4
    kept = (label != 255) & (h < limit)
    assert ((found > 0) == kept)[~near].all()
    count = (found > 0).sum()
    if count:
        np.testing.assert_allclose(found.max(), label.size / count**2, rtol=1e-5)
    assert not found[label == 255].any()


def test_percentiles_have_the_precision_of_the_entropies():
    code = """
import json
import jax.numpy as jnp, numpy as np
from mpmc_jax.methods.u2pl.entropy import entropy_percentile
h = 1.38 + 1e-9 * np.random.default_rng(0).random((2, 16, 16))
percents = jnp.asarray([20, 80, 83.25], jnp.float32)
found = entropy_percentile(jnp.asarray(h), jnp.ones(h.shape, bool), percents)
print(json.dumps(np.abs(found - np.percentile(h, [20, 80, 83.25])).max()))
"""
    assert run_x64(code) < 1e-15


def test_no_pixel_and_equal_entropies_keep_none():
    logits = jnp.zeros((1, 3, 3, 4))
    assert not percentile_weights(logits, jnp.full((1, 3, 3), 255), 80.0).any()
    # The limit is their own entropy, and what reaches it is dropped.
    assert not percentile_weights(logits, jnp.zeros((1, 3, 3), int), 80.0).any()


def sets_of_golden(arrays, setting):
    """The pixel sets of a golden call, and the teacher's embeddings of them."""
    bounds = u2pl_sets.Bounds(
        anchor_above=float(setting["current_class_threshold"]),
        key_below=float(setting["current_class_negative_threshold"]),
        low_rank=int(setting["low_rank"]),
        high_rank=int(setting["high_rank"]),
    )
    sets = jax.jit(u2pl_sets.released_sets, static_argnums=5)(
        jnp.asarray(arrays["labels_labeled"]),
        jnp.asarray(arrays["pseudo_labels"]),
        jax.nn.softmax(channels_last(arrays["teacher_logits"])),
        jnp.asarray(arrays["low_entropy_mask"]),
        jnp.asarray(arrays["high_entropy_mask"]),
        bounds,
    )
    return sets, u2pl_sets.released_pixels(channels_last(arrays["rep_teacher"]))


def bank_of_golden(arrays, rings, pixels, negatives):
    """The banks after a golden call."""
    bank = rings.empty(pixels.shape[-1], pixels.dtype)
    for label in range(len(rings.capacities)):
        before = arrays[f"bank_before_{label}"]
        chosen = np.zeros((len(before), len(rings.capacities)), bool)
        chosen[:, label] = True
        if len(before):
            bank = _PUSH(rings, bank, jnp.asarray(before), jnp.asarray(chosen))
    return _PUSH(rings, bank, pixels, negatives)


def recorded_draws(arrays, sets, bank, setting):
    """Uniform numbers that choose what the recorded indices did."""
    queries, negatives = int(setting["num_queries"]), int(setting["num_negatives"])
    valid = [int(v) for v in arrays["valid_classes"]]
    num_classes = len(arrays["bank_sizes"])
    anchor = np.zeros((num_classes, queries))
    negative = np.zeros((num_classes, queries, negatives))
    recorded = iter(range(1000))
    for k, label in enumerate(valid):
        anchors = int(np.asarray(sets.anchor)[:, k].sum())
        size = int(bank.size[label])
        if anchors and size:
            index = arrays[f"draw_{next(recorded)}"]
            anchor[k] = (index + 0.5) / anchors
            index = arrays[f"draw_{next(recorded)}"].reshape(queries, negatives)
            negative[k] = (index + 0.5) / size
    assert f"draw_{next(recorded)}" not in arrays
    return Draws(jnp.asarray(anchor), jnp.asarray(negative))


def test_contrastive_loss_and_banks_are_the_released_ones():
    for path in golden.golden_files("u2pl_contrastive*.npz"):
        arrays = dict(np.load(path))
        setting = {k.removeprefix("cfg_"): v for k, v in arrays.items() if "cfg_" in k}
        rings = Rings(tuple(int(size) for size in arrays["bank_sizes"]))
        sets, pixels = sets_of_golden(arrays, setting)
        bank = bank_of_golden(arrays, rings, pixels, sets.negative)
        draws = recorded_draws(arrays, sets, bank, setting)
        temperature = float(setting["temperature"])

        @jax.jit
        def loss(
            student,
            sets=sets,
            pixels=pixels,
            bank=bank,
            draws=draws,
            rings=rings,
            temperature=temperature,
        ):
            return info_nce(
                u2pl_sets.released_pixels(student),
                sets.anchor,
                prototypes(pixels, sets.prototype),
                sets.present,
                rings,
                bank,
                draws,
                temperature=temperature,
                released_indexing=True,
            )

        student = channels_last(arrays["rep_student"])
        value, gradient = jax.value_and_grad(loss)(student)
        np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
        norm = np.linalg.norm(gradient)
        np.testing.assert_allclose(norm, arrays["grad_norm"], rtol=1e-5)
        np.testing.assert_array_equal(
            np.flatnonzero(sets.present), arrays["valid_classes"]
        )
        np.testing.assert_array_equal(
            sets.negative.sum(0), arrays["new_keys_per_class"]
        )
        for label in range(len(rings.capacities)):
            order = jnp.arange(int(bank.size[label]))
            found = np.asarray(bank.keys[rings.rows(bank, label, order)])
            expected = arrays[f"bank_after_{label}"].astype(np.float32)
            np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_a_ring_holds_the_last_keys_in_order(sizes, seed):
    rings = Rings((4, 7))
    bank = rings.empty(2)
    rng = np.random.default_rng(seed)
    expected = [np.zeros((0, 2), np.float32)] * 2
    for size in sizes:
        features = rng.normal(size=(9, 2)).astype(np.float32)
        chosen = rng.random((9, 2)) < size / 9
        bank = _PUSH(rings, bank, jnp.asarray(features), jnp.asarray(chosen))
        for label, capacity in enumerate(rings.capacities):
            grown = np.concatenate([expected[label], features[chosen[:, label]]])
            expected[label] = grown[-capacity:]
    for label in range(2):
        order = jnp.arange(int(bank.size[label]))
        found = bank.keys[rings.rows(bank, label, order)]
        np.testing.assert_array_equal(found, expected[label])


def test_nth_true_and_ranks():
    mask = jnp.asarray([0, 1, 1, 0, 1], bool)
    np.testing.assert_array_equal(nth_true(mask, jnp.arange(3)), [1, 2, 4])
    p = jnp.asarray([[0.2, 0.5, 0.2, 0.1]])
    np.testing.assert_array_equal(u2pl_sets.ranks(p), [[1, 0, 2, 3]])


@pytest.mark.parametrize("present", [[False] * 3, [True, False, False]])
def test_with_one_class_or_none_the_loss_is_zero(present):
    rings = Rings((4, 4, 4))
    features = jnp.zeros((6, 2))
    bank = rings.push(rings.empty(2), features + 1, jnp.ones((6, 3), bool))

    def loss(x):
        return info_nce(
            x,
            jnp.ones((6, 3), bool),
            jnp.zeros((3, 2)),
            jnp.asarray(present),
            rings,
            bank,
            Draws(jnp.zeros((3, 5)), jnp.zeros((3, 5, 2))),
            temperature=0.5,
            released_indexing=True,
        )

    value, gradient = jax.value_and_grad(loss)(features)
    assert value == 0
    assert np.isfinite(gradient).all() and not gradient.any()
