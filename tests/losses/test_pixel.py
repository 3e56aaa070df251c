from functools import partial

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from mpmc_jax import losses
from tests.support.golden import golden_files
from tests.support.x64 import run_x64

SHAPE = (4, 3, 5)
CLASSES = 4
OHEM = {"threshold": 0.05, "min_kept": 9}

LOGITS = hnp.arrays(
    np.float32,
    (*SHAPE, CLASSES),
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-4, 4, width=32),
)
LABELS = hnp.arrays(np.int32, SHAPE, elements=st.sampled_from([*range(CLASSES), 255]))
VOID = st.just(np.full(SHAPE, 255, np.int32))
OUT_OF_RANGE = hnp.arrays(np.uint8, SHAPE)

SCALARS = {
    "cross_entropy": losses.cross_entropy,
    "ohem": partial(losses.ohem_cross_entropy, **OHEM),
}


def reference_pixel(logits, label):
    """One pixel, in float64, from the definition."""
    if not 0 <= label < len(logits):
        return 0.0
    z = np.asarray(logits, np.float64)
    z = z - z.max()
    return float(np.log(np.exp(z).sum()) - z[label])


def reference_map(logits, labels):
    out = np.zeros(labels.shape)
    for index in np.ndindex(*labels.shape):
        out[index] = reference_pixel(logits[index], int(labels[index]))
    return out


def reference_keep(logits, labels, threshold, min_kept):
    valid = labels < logits.shape[-1]
    if min_kept == 0 or min_kept > valid.sum():
        return valid
    own = np.where(valid, np.exp(-reference_map(logits, labels)), 1.0)
    tau = max(threshold, sorted(own.ravel())[min_kept - 1])
    return valid & (own <= tau)


def draw(seed=0, shape=SHAPE, void=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (*shape, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, shape)
    return logits, np.where(rng.random(shape) < void, 255, labels).astype(np.int32)


def test_pixel_cross_entropy_is_the_definition():
    logits, labels = draw()
    np.testing.assert_allclose(
        losses.pixel_cross_entropy(logits, labels),
        reference_map(logits, labels),
        rtol=1e-5,
        atol=1e-6,
    )


def test_any_label_can_be_the_void_one():
    logits, labels = draw(void=0)
    loss = losses.pixel_cross_entropy(logits, labels, ignore_label=2)
    expected = np.where(labels == 2, 0, reference_map(logits, labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_logits_are_computed_in_float32():
    logits, labels = draw()
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = losses.pixel_cross_entropy(half, labels)
    assert loss.dtype == jnp.float32
    exact = reference_map(np.asarray(half.astype(jnp.float32)), labels)
    np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-6)


def test_weights_scale_and_do_not_renormalize():
    logits, labels = draw()
    rng = np.random.default_rng(1)
    weights = rng.random(SHAPE).astype(np.float32)
    where = rng.random(SHAPE) < 0.5
    counted = where & (labels != 255)
    expected = (weights * reference_map(logits, labels))[counted].sum() / counted.sum()
    loss = losses.cross_entropy(logits, labels, weights=weights, where=where)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 9, 40, 60, 61, 10_000])
def test_ohem_keeps_by_the_rank_rule(threshold, min_kept):
    logits, labels = draw(void=0.2)
    kept = losses.ohem_keep(logits, labels, threshold=threshold, min_kept=min_kept)
    expected = reference_keep(logits, labels, threshold, min_kept)
    np.testing.assert_array_equal(kept, expected)
    assert expected.any()


def test_ohem_keeps_every_tie():
    logits = np.zeros((1, 2, 3, CLASSES), np.float32)
    labels = np.array([[[0, 1, 2], [3, 255, 0]]])
    kept = losses.ohem_keep(logits, labels, threshold=0.1, min_kept=2)
    np.testing.assert_array_equal(kept, labels != 255)


def test_ohem_ranks_within_groups():
    logits, labels = draw()
    groups = logits.reshape(2, 2, *logits.shape[1:]), labels.reshape(2, 2, *SHAPE[1:])
    kept = losses.ohem_keep(logits, labels, **OHEM, group_size=2)
    kept = kept.reshape(2, 2, *SHAPE[1:])
    alone = [reference_keep(*pair, **OHEM) for pair in zip(*groups, strict=True)]
    np.testing.assert_array_equal(kept, np.stack(alone))
    assert (kept.reshape(SHAPE) != reference_keep(logits, labels, **OHEM)).any()


def test_golden_ohem():
    cases = [
        (golden, name)
        for golden in map(np.load, golden_files("ohem*.npz"))
        for name in golden.files
        if name.startswith("logits_")
    ]
    assert cases
    for golden, name in cases:
        case = name.removeprefix("logits_")
        rule = {
            "threshold": float(golden[f"thresh_{case}"]),
            "min_kept": int(golden[f"min_kept_{case}"]),
        }

        @jax.jit
        def compute(logits, labels, rule=rule):
            loss = partial(losses.ohem_cross_entropy, **rule)
            kept = losses.ohem_keep(logits, labels, **rule).sum()
            return *jax.value_and_grad(loss)(logits, labels), kept

        logits = golden[name].transpose(0, 2, 3, 1)
        loss, gradient, kept = compute(logits, golden[f"labels_{case}"])
        np.testing.assert_allclose(loss, golden[f"loss_{case}"], rtol=1e-5)
        norm = np.linalg.norm(np.ravel(gradient))
        np.testing.assert_allclose(norm, golden[f"grad_norm_{case}"], rtol=1e-5)
        assert int(kept) == int(golden[f"kept_{case}"])


def test_float64_stays_float64():
    found = run_x64(
        """
import json
import jax
from tests.losses import test_pixel as here
logits, labels = here.draw()
found = {}
for name, loss in here.SCALARS.items():
    value = jax.jit(loss)(logits.astype("float64"), labels)
    found[name] = [str(value.dtype), float(value)]
print(json.dumps(found))
"""
    )
    logits, labels = draw()
    keep = reference_keep(logits, labels, **OHEM)
    for name, counted in {"cross_entropy": labels != 255, "ohem": keep}.items():
        dtype, value = found[name]
        assert dtype == "float64"
        exact = reference_map(logits, labels)[counted].mean()
        np.testing.assert_allclose(value, exact, rtol=1e-13)


class Properties(chex.TestCase):
    """Every scalar loss, with and without jit and on all devices."""

    @chex.all_variants
    @parameterized.parameters(*SCALARS)
    def test_any_input_gives_a_finite_loss_and_gradient(self, name):
        compute = self.variant(jax.value_and_grad(SCALARS[name]))

        @settings(max_examples=15, deadline=None)
        @given(LOGITS, LABELS | VOID | OUT_OF_RANGE)
        def check(logits, labels):
            labels = labels.astype(np.int32)
            loss, gradient = compute(jnp.asarray(logits), jnp.asarray(labels))
            assert np.isfinite(loss) and loss >= 0
            assert np.isfinite(gradient).all()
            void = labels >= CLASSES
            assert not np.asarray(gradient)[void].any()
            if void.all():
                assert loss == 0

        check()

    @chex.all_variants
    @parameterized.parameters(*SCALARS)
    def test_batch_order_and_a_common_offset_do_not_matter(self, name):
        compute = self.variant(jax.value_and_grad(SCALARS[name]))

        @settings(max_examples=15, deadline=None)
        @given(
            st.integers(0, 2**16),
            st.permutations(range(SHAPE[0])),
            st.integers(-(2**13), 2**13),
        )
        def check(seed, order, offset):
            # Multiples of 1/64: adding the offset is exact, so no rank can flip.
            logits, labels = draw(seed)
            logits = np.round(logits * 64) / 64
            loss, gradient = compute(jnp.asarray(logits), jnp.asarray(labels))
            order = np.asarray(order)
            moved, moved_gradient = compute(
                jnp.asarray(logits[order] + np.float32(offset)),
                jnp.asarray(labels[order]),
            )
            np.testing.assert_allclose(moved, loss, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(
                moved_gradient, np.asarray(gradient)[order], rtol=1e-5, atol=1e-7
            )

        check()

    @chex.all_variants
    def test_every_variant_agrees_with_the_reference(self):
        logits, labels = draw()
        keep = reference_keep(logits, labels, **OHEM)
        expected = {
            "cross_entropy": reference_map(logits, labels)[labels != 255].mean(),
            "ohem": reference_map(logits, labels)[keep].mean(),
        }
        for name, loss in SCALARS.items():
            value = self.variant(loss)(jnp.asarray(logits), jnp.asarray(labels))
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_a_batch_spread_over_devices_has_the_loss_of_the_whole():
    logits, labels = draw()
    labels[0] = 255  # devices hold unequal numbers of counted pixels
    devices = jax.local_device_count()
    parts = (
        logits.reshape(devices, -1, *logits.shape[1:]),
        labels.reshape(devices, -1, *SHAPE[1:]),
    )

    def global_sum(x):
        return x + jax.lax.stop_gradient(jax.lax.psum(x, "device") - x)

    @partial(jax.pmap, axis_name="device")
    def spread(logits, labels):
        loss = partial(losses.cross_entropy, global_sum=global_sum)
        return jax.value_and_grad(loss)(logits, labels)

    value, gradient = spread(*parts)
    whole, whole_gradient = jax.value_and_grad(losses.cross_entropy)(logits, labels)
    np.testing.assert_allclose(value, np.full(devices, whole), rtol=1e-6)
    np.testing.assert_allclose(
        gradient.reshape(logits.shape), whole_gradient, rtol=1e-5, atol=1e-8
    )


def reference_balance(labels, where):
    """Pixel by pixel: all counted pixels over classes that occur, over one's own."""
    counted = [
        c
        for c, w in zip(labels.ravel(), where.ravel(), strict=True)
        if w and c < CLASSES
    ]
    out = np.zeros(labels.shape)
    for index in np.ndindex(*labels.shape):
        if where[index] and labels[index] < CLASSES:
            own = counted.count(labels[index])
            out[index] = len(counted) / (len(set(counted)) * own)
    return out


@settings(max_examples=30, deadline=None)
@given(LABELS | VOID, hnp.arrays(np.bool_, SHAPE))
def test_every_class_that_occurs_weighs_the_same(labels, where):
    found = np.asarray(losses.class_balance(labels, where, CLASSES))
    np.testing.assert_allclose(found, reference_balance(labels, where), rtol=1e-5)
    sums = [found[labels == c].sum() for c in range(CLASSES)]
    present = [s for s in sums if s]
    np.testing.assert_allclose(present, present[:1] * len(present), rtol=1e-5)
    np.testing.assert_allclose(
        found.sum(), np.sum(where & (labels < CLASSES)), rtol=1e-5, atol=1e-6
    )
    counts = losses.class_counts(jnp.asarray(labels), jnp.asarray(where), CLASSES)
    assert counts.tolist() == [int(np.sum(where & (labels == c))) for c in range(4)]


def test_classes_are_balanced_over_devices():
    labels = np.array([0, 0, 0, 1, 0, 0, 2, 1]).reshape(4, 1, 2)

    def global_sum(x):
        return jax.lax.psum(x, "device")

    spread = jax.pmap(
        lambda y: losses.class_balance(
            y, jnp.ones(y.shape, bool), CLASSES, global_sum=global_sum
        ),
        axis_name="device",
    )
    found = np.asarray(spread(labels[:, None])).ravel()
    expected = [8 / 3 / {0: 5, 1: 2, 2: 1}[c] for c in labels.ravel()]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
