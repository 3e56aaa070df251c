"""U2PL as a whole against slow loops, in both forms of its contrast."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.methods.u2pl.warmup import Warmup
from tests.support.linear_network import network
from tests.support.u2pl_oracle import (
    CHANNELS,
    CLASSES,
    EXAMPLES,
    FORMS,
    GROUPS,
    MEMBERS,
    METHOD,
    contrast_oracle,
    make_inputs,
    run,
    setting,
    unsupervised_oracle,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_banks_are_the_oracles(form, seed):
    method, student, teacher, inputs, bank = setting(seed, form)
    value, terms, _, (_, moved, after) = run(method, student, teacher, inputs, bank)
    unsupervised = unsupervised_oracle(student, teacher, inputs)
    np.testing.assert_allclose(terms["unlabeled"], unsupervised, rtol=1e-5)
    contrast, new = contrast_oracle(form, student, teacher, inputs, after)
    assert contrast > 0
    np.testing.assert_allclose(terms["contrast"], contrast, rtol=1e-5)
    weight = {"released": 1 / GROUPS, "corrected": 0.1}[form]
    expected = terms["supervised"] + unsupervised + weight * contrast
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert moved["student"] == 1  # one train-mode pass
    rings = method.pixel_contrast.rings
    for c, capacity in enumerate(rings.capacities):
        found = after.keys[rings.rows(after, c, jnp.arange(int(after.size[c])))]
        if form == "released":
            # In order, the last that fit.
            np.testing.assert_allclose(
                found,
                np.reshape(new[c][-capacity:], (-1, CHANNELS)),
                rtol=1e-5,
                atol=1e-6,
            )
        else:
            candidates = np.reshape(new[c], (1, -1, CHANNELS))
            gaps = np.abs(np.asarray(found)[:, None] - candidates).max(-1)
            assert (gaps.min(1) < 1e-5).all()
            assert len(set(gaps.argmin(1))) == len(found)
            assert len(found) <= capacity


def test_a_second_step_adds_to_the_banks():
    method, student, teacher, inputs, bank = setting(0)
    for _ in range(2):
        before = bank
        *_, (_, _, bank) = run(method, student, teacher, inputs, bank)
    assert (np.asarray(bank.size) >= np.asarray(before.size)).all()
    assert bank.size.sum() > before.size.sum()


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_on_the_scores_changes_nothing(form):
    method, student, teacher, inputs, bank = setting(1, form)
    value, *_ = run(method, student, teacher, inputs, bank)
    more = jnp.full((1, 1, 1, 1), 3.0)
    moved, *_ = run(
        method, student.replace(bias=more), teacher.replace(bias=more), inputs, bank
    )
    np.testing.assert_allclose(moved, value, rtol=2e-5)


def test_order_within_a_group_changes_nothing_but_which_are_drawn():
    method, student, teacher, inputs, bank = setting(2, "corrected")
    swap = np.arange(EXAMPLES).reshape(GROUPS, MEMBERS)[:, ::-1].reshape(-1)
    both = np.concatenate([swap, EXAMPLES + swap])
    swapped = jax.tree.map(lambda x: x[swap] if x.ndim > 2 else x, inputs)
    swapped = swapped.replace(
        draws=inputs.draws,
        decoder_dropout={k: v[both] for k, v in inputs.decoder_dropout.items()},
        teacher_decoder_dropout={
            k: v[both] for k, v in inputs.teacher_decoder_dropout.items()
        },
    )
    one = run(method, student, teacher, inputs, bank)
    other = run(method, student, teacher, swapped, bank)
    for term in ("supervised", "unlabeled"):
        np.testing.assert_allclose(other[1][term], one[1][term], rtol=1e-5)
    before, after = one[3][0].anchoring, other[3][0].anchoring
    np.testing.assert_allclose(after.prototype, before.prototype, atol=1e-5)
    np.testing.assert_array_equal(after.present, before.present)
    np.testing.assert_array_equal(after.anchor.sum(1), before.anchor.sum(1))
    np.testing.assert_array_equal(other[3][2].size, one[3][2].size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["void", "absent", "equal", "plain"])
def test_gradients_are_finite_always(form, case):
    method, student, teacher, inputs, bank = setting(3, form, void=case == "void")
    if case == "absent":
        inputs = inputs.replace(label=jnp.minimum(inputs.label, 1))
    if case == "equal":
        # Every pixel has the same entropy: it is the limit, and nothing is below.
        teacher = teacher.replace(matrix=jnp.zeros_like(teacher.matrix))
    value, terms, gradient, _ = run(method, student, teacher, inputs, bank)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    if case == "void":
        assert terms["supervised"] == 0
    if case == "equal":
        assert terms["unlabeled"] == 0


def test_two_classes_train_with_a_contrast():
    contrast = dataclasses.replace(METHOD.pixel_contrast, num_classes=2, high_rank=2)
    method = dataclasses.replace(METHOD, pixel_contrast=contrast)
    inputs = make_inputs(4)
    draws = jax.tree.map(lambda x: x[:, :2], inputs.draws)
    label = jnp.where(inputs.label == 255, 255, inputs.label % 2)
    student = network(1, 2, train=True)
    teacher = network(2, 2, train=False)
    _, terms, gradient, _ = run(
        method,
        student,
        teacher,
        inputs.replace(draws=draws, label=label),
        method.init(None),
    )
    assert terms["contrast"] > 0
    assert np.abs(gradient.embedder).max() > 0


def test_too_many_candidates_are_drawn_uniformly_and_shared_by_groups():
    contrast = dataclasses.replace(
        FORMS["corrected"].pixel_contrast, bank_size=8, bank_size_first=8
    )
    pixels = jnp.arange(GROUPS * 30.0).reshape(GROUPS, 30, 1)
    pixels = jnp.broadcast_to(pixels, (GROUPS, 30, CHANNELS))
    negatives = jnp.ones((GROUPS, 30, CLASSES), bool)

    @jax.jit
    def fill(sampling_key):
        groups = (jnp.arange(GROUPS), sampling_key)
        return contrast._fill(contrast.empty(), pixels, negatives, groups)

    drawn = np.zeros(GROUPS * 30)
    for seed in range(300):
        bank = fill(jax.random.split(jax.random.key(seed), GROUPS))
        values = np.asarray(bank.keys[:8, 0]).astype(int)
        assert (values < 30).sum() == 4  # half of the bank a group
        assert len(set(values)) == 8
        drawn[values] += 1
    # 300 draws of 4 of 30: 40 each on average, with a deviation of 6.
    assert drawn.min() > 15 and drawn.max() < 68


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"low_rank": 4}, "ranks of 4 classes .* use u2pl.low_rank=1"),
        ({"low_rank": 2, "high_rank": 2}, "low_rank=2, u2pl.high_rank=2"),
        ({"contrast": "paper"}, r"valid: \['corrected', 'released'\]"),
        ({"bank_dtype": "float16"}, "bfloat16"),
        ({"queries": 0}, "u2pl.queries=0"),
        ({"anchor_above": 2.0}, "u2pl.anchor_above=2.0: must lie in"),
        ({"key_below": -1.0}, "u2pl.key_below=-1.0: must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD.pixel_contrast, **changes)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="a group of at least 2"):
        dataclasses.replace(METHOD, group_size=1)


def test_bytes_follow_the_banks():
    contrast = METHOD.pixel_contrast
    half = dataclasses.replace(contrast, bank_dtype="bfloat16")
    (bank, *_), (less, *_) = (c.memory(100, 2).values() for c in (contrast, half))
    assert bank == 2 * (60 + 3 * 40) * CHANNELS * 4 == 2 * less


def test_the_teacher_waits_then_copies_then_averages():
    decay = lambda step: METHOD.average_decays(jnp.int32(step), 100)  # noqa: E731
    assert [float(decay(step)[0]) for step in (0, 98, 99, 100, 199)] == [1, 1, 0, 0, 0]
    np.testing.assert_allclose(decay(200)[0], 0.99, rtol=1e-6)
    assert decay(200)[1] is None
    warmup = METHOD.phase(0)
    assert isinstance(warmup, Warmup) and METHOD.phase(1) is METHOD
    assert warmup == METHOD.phase(0)  # one program
    for step in (5, 99):
        assert warmup.average_decays(jnp.int32(step), 100)[0] == decay(step)[0]
    at_once = dataclasses.replace(METHOD, warmup_epochs=0)
    assert at_once.phase(0) is at_once
    assert not at_once.independent_teacher_init() and METHOD.independent_teacher_init()
    # A short epoch: averaging begins as a plain mean.
    np.testing.assert_allclose(at_once.average_decays(jnp.int32(20), 20)[0], 1 - 1 / 21)


def test_banks_in_half_precision_and_a_contrast_that_is_off():
    method, student, teacher, inputs, _ = setting(0)

    def with_contrast(**changes):
        contrast = dataclasses.replace(method.pixel_contrast, **changes)
        changed = dataclasses.replace(method, pixel_contrast=contrast)
        return run(changed, student, teacher, inputs, changed.init(None))

    full = with_contrast()
    half = with_contrast(bank_dtype="bfloat16")
    assert half[3][2].keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[1]["contrast"], full[1]["contrast"], rtol=0.02)
    off = with_contrast(contrast_weight=0.0)
    assert not off[2].embedder.any() and full[2].embedder.any()
    np.testing.assert_allclose(off[1]["contrast"], full[1]["contrast"], rtol=1e-6)
