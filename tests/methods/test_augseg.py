"""AugSeg's mixing, targets and loss against slow and obvious NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.methods.augseg import AugSeg, Inputs
from mpmc_jax.training.objective import view_loss
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Features, Prediction
from tests.support import tiny

GROUPS, MEMBERS, SIZE, CLASSES = 2, 3, (6, 7), 4
EXAMPLES = GROUPS * MEMBERS
METHOD = AugSeg(group_size=MEMBERS, threshold=0.6)


class FullSize:
    """The module of a network whose scores have the size of its images."""

    def upsample(self, logits, size):
        assert logits.shape[1:3] == size
        return logits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("matrix", "bias"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Linear:
    """A network whose scores are the colors times a matrix, plus a bias."""

    matrix: jax.Array
    bias: jax.Array

    module = FullSize()

    def encode(self, images, dropout_keys=None, passes=1):
        del dropout_keys, passes
        return Features({"layer1": images}, images.shape[1:3]), self

    def decode(self, features, decoder_dropout=None, passes=1):
        assert decoder_dropout is None and passes == 1
        logits = features.taps["layer1"] @ self.matrix + self.bias
        return Prediction(logits=logits), self


def _inputs(seed):
    rng = np.random.default_rng(seed)
    shape = (EXAMPLES, *SIZE)

    def rectangles():
        masks = np.zeros(shape, bool)
        for mask in masks:
            top, left = rng.integers(0, SIZE[0] - 2), rng.integers(0, SIZE[1] - 2)
            mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = 1
        return masks

    real = np.ones(shape, bool)
    real[::2, 4:] = False
    arrays = Inputs(
        image=rng.normal(size=(*shape, 3)),
        label=np.where(rng.random(shape) < 0.2, 255, rng.integers(0, CLASSES, shape)),
        weak=rng.normal(size=(*shape, 3)),
        strong=rng.normal(size=(*shape, 3)),
        real=real,
        orders=np.stack([rng.permutation(MEMBERS) for _ in range(GROUPS)]),
        labeled_mask=rectangles(),
        mask=rectangles(),
        coin=rng.random(EXAMPLES).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, arrays)


def _networks(seed, scale=2.0):
    rng = np.random.default_rng(seed + 1000)
    none = jnp.zeros((1, 1, 1, 1))
    return tuple(
        Linear(jnp.asarray(rng.normal(0, scale, (3, CLASSES))), none) for _ in "ts"
    )


@functools.partial(jax.jit, static_argnames="method")
def _view(inputs, teacher, student, method=METHOD):
    targets, moved, _ = method.prepare({"student": teacher}, inputs, {})
    assert moved == {}
    outputs = method.views(
        {"student": student}, {"student": teacher}, inputs, targets, {}
    )
    return outputs.views[0], targets


@functools.partial(jax.jit, static_argnames="method")
def _loss(inputs, teacher, student, method=METHOD):
    view, _ = _view(inputs, teacher, student, method)
    count = jnp.sum(view.region.valid, dtype=jnp.int32)
    return view_loss(view, Reduction(None, {"unlabeled": count}))


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _oracle(inputs, teacher, student, threshold):
    """The mixed pictures and labels, pixel by pixel, and the loss."""
    x = jax.tree.map(np.asarray, inputs)
    p = _softmax(x.weak @ np.asarray(teacher.matrix))
    entropy = -(p * np.log(p + 1e-10)).sum(-1)
    sure = (p.max(-1) * (1 - entropy / np.log(CLASSES))).mean((1, 2))
    kinds = {
        "strong": (x.image, x.strong),
        "weak": (x.image, x.weak),
        "label": (x.label, p.argmax(-1)),
        "confidence": (np.ones(p.shape[:3]), p.max(-1)),
        "truth": (np.ones(p.shape[:3], bool), np.zeros(p.shape[:3], bool)),
    }
    mixed = {}
    for kind, (labeled, unlabeled) in kinds.items():
        copy, out = unlabeled.copy(), unlabeled.copy()
        partners = [
            i - i % MEMBERS + x.orders[i // MEMBERS, i % MEMBERS]
            for i in range(EXAMPLES)
        ]
        for i, j in enumerate(partners):
            if x.coin[i] < 1 - sure[i]:
                copy[i][x.labeled_mask[i]] = labeled[j][x.labeled_mask[i]]
        for i, j in enumerate(partners):
            out[i][x.mask[i]] = copy[j][x.mask[i]]
        mixed[kind] = out
    q = _softmax(mixed["strong"] @ np.asarray(student.matrix))
    total = 0.0
    for place in np.ndindex(*mixed["label"].shape):
        label = mixed["label"][place]
        if label != 255 and mixed["confidence"][place] >= threshold:
            total -= np.log(q[place][label])
    return mixed, total / mixed["label"].size


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_targets_and_loss_are_the_oracles(seed):
    inputs, (teacher, student) = _inputs(seed), _networks(seed)
    view, targets = _view(inputs, teacher, student)
    mixed, loss = _oracle(inputs, teacher, student, METHOD.threshold)
    np.testing.assert_array_equal(view.target, mixed["label"])
    np.testing.assert_array_equal(view.truth, mixed["truth"])
    np.testing.assert_allclose(targets.confidence, mixed["confidence"], rtol=1e-5)
    np.testing.assert_allclose(view.image, mixed["weak"], rtol=1e-6)
    np.testing.assert_allclose(_loss(inputs, teacher, student), loss, rtol=1e-5)
    assert not np.asarray(view.weight)[mixed["label"] == 255].any()


@given(seed=st.integers(0, 10_000), shift=st.floats(-30, 30))
@settings(deadline=None, max_examples=15)
def test_order_within_a_group_and_a_constant_on_the_scores_change_nothing(seed, shift):
    inputs, (teacher, student) = _inputs(seed), _networks(seed)
    expected = _loss(inputs, teacher, student)
    rng = np.random.default_rng(seed)
    moves = np.stack([rng.permutation(MEMBERS) for _ in range(GROUPS)])
    places = (moves + MEMBERS * np.arange(GROUPS)[:, None]).reshape(-1)
    moved = jax.tree.map(lambda x: x[places], inputs.replace(orders=None))
    back = np.argsort(moves, axis=1)
    orders = np.asarray(inputs.orders)
    moved = moved.replace(
        orders=jnp.asarray(
            [[back[g][orders[g][m]] for m in moves[g]] for g in range(GROUPS)]
        )
    )
    np.testing.assert_allclose(_loss(moved, teacher, student), expected, rtol=1e-5)
    bias = jnp.full((1, 1, 1, 1), shift)
    shifted = [dataclasses.replace(net, bias=bias) for net in (teacher, student)]
    other = _loss(inputs, *shifted)
    np.testing.assert_allclose(other, expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=15)
def test_gradients_are_finite_and_void_has_none(seed, scale):
    inputs, (teacher, student) = _inputs(seed), _networks(seed, scale)
    inputs = inputs.replace(label=jnp.full_like(inputs.label, 255))

    def loss(bias):
        return _loss(inputs, teacher, dataclasses.replace(student, bias=bias))

    # The student sees the labeled images first, then the mixed ones.
    bias = jnp.zeros((2 * EXAMPLES, *SIZE, CLASSES))
    value, gradient = jax.value_and_grad(loss)(bias)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    view, _ = _view(inputs, teacher, student)
    void = np.asarray(view.target == 255)
    assert not np.asarray(gradient)[:EXAMPLES].any()
    assert not np.asarray(gradient)[EXAMPLES:][void].any()


@pytest.mark.parametrize("case", ["plain", "absent", "void", "certain"])
def test_gradients_of_the_network_are_finite(case):
    inputs, (teacher, student) = _inputs(7), _networks(7)
    if case == "absent":
        inputs = inputs.replace(label=jnp.minimum(inputs.label, 1))
    if case == "void":
        inputs = inputs.replace(label=jnp.full_like(inputs.label, 255))
    if case == "certain":
        teacher = dataclasses.replace(teacher, matrix=1e4 * teacher.matrix)

    def loss(matrix):
        return _loss(inputs, teacher, dataclasses.replace(student, matrix=matrix))

    value, gradient = jax.value_and_grad(loss)(student.matrix)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    _, expected = _oracle(inputs, teacher, student, METHOD.threshold)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(gradient).max() > 0


@pytest.mark.full
def test_no_two_examples_draw_the_same():
    cfg = tiny.config("method=augseg")
    parts = tiny.setup(cfg)
    state, batch = tiny.init_state(parts, 0), tiny.batch(0, cfg, parts.step.method)
    keys = make_keys(parts.step, state, batch)
    inputs = jax.jit(lambda: parts.step.method.augment(batch, {}, keys))()
    assert len(np.unique(inputs.coin)) == cfg.train.batch_size
    for name in ("mask", "labeled_mask"):
        masks = np.asarray(getattr(inputs, name)).reshape(cfg.train.batch_size, -1)
        assert len(np.unique(masks, axis=0)) == cfg.train.batch_size


def test_a_confidence_at_the_threshold_counts():
    inputs, (teacher, student) = _inputs(0), _networks(0)
    _, targets = _view(inputs, teacher, student)
    values = np.asarray(targets.confidence)
    exact = float(np.sort(values[values < 1])[5])
    view, _ = _view(
        inputs, teacher, student, dataclasses.replace(METHOD, threshold=exact)
    )
    at = (values == np.float32(exact)) & (np.asarray(view.target) != 255)
    assert at.any() and np.asarray(view.weight)[at].all()
    assert not np.asarray(view.weight)[values < np.float32(exact)].any()


def test_padding_is_trained_on_but_is_no_patch():
    inputs, (teacher, student) = _inputs(0), _networks(0)
    view, _ = _view(inputs, teacher, student)
    assert np.asarray(view.region.valid).all()
    real = np.asarray(view.region.real)
    x = jax.tree.map(np.asarray, inputs)
    for i in range(EXAMPLES):
        j = i - i % MEMBERS + x.orders[i // MEMBERS, i % MEMBERS]
        expected = np.where(x.mask[i], x.real[j], x.real[i])
        np.testing.assert_array_equal(real[i], expected)
    assert (np.asarray(view.weight) > 0)[~real].any()


def test_the_teacher_is_a_copy_in_the_first_epoch():
    def decay(step, steps_per_epoch):
        one, other = METHOD.average_decays(jnp.int32(step), steps_per_epoch)
        assert one == other
        return float(one)

    assert decay(700, 701) == 0
    np.testing.assert_allclose(decay(700, 700), 1 - 1 / 701, rtol=1e-6)
    np.testing.assert_allclose(decay(5000, 700), 0.999, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"group_size": 1}, "leaves no other image"), ({"ema_decay": 1.0}, "ema_decay=1")],
)
def test_settings_it_cannot_work_with_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD, **change)
