"""What `augment` draws: keys, schedules, frequencies, who shares what."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.methods.ael import memory_bank
from mpmc_jax.methods.registry import METHODS
from mpmc_jax.methods.unimatch import UniMatch
from mpmc_jax.random_keys import Keys
from mpmc_jax.training.parallel import Layout
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Features, Prediction
from tests.support import tiny
from tests.support.ael_oracle import METHOD as AEL

EPOCH, RUN = tiny.STEPS_PER_EPOCH, 20
STEPS = 96


def _drawing(method, state=lambda method: None, **changes):
    """Step -> the inputs of one and the same batch, and the method."""
    cfg = tiny.config(f"method={method}", **changes)
    parts = tiny.setup(cfg)
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[layout.order(len(x), 1, 1)]),
        tiny.batch(0, cfg, parts.step.method),
    )
    own = state(parts.step.method)

    def draw(step):
        run = types.SimpleNamespace(
            key=jax.random.key_data(jax.random.key(0)), step=step
        )
        return parts.step.method.augment(batch, own, make_keys(parts.step, run, batch))

    return jax.jit(draw), parts.step.method


def _over_steps(draw, names):
    """The named inputs of many steps, stacked."""
    many = jax.jit(
        lambda steps: jax.lax.map(
            lambda step: [getattr(draw(step), name) for name in names], steps
        )
    )
    return many(jnp.arange(STEPS))


def test_u2pls_percentiles_follow_the_epoch():
    draw, method = _drawing("u2pl")
    assert (method.kept_percent, method.contrast_percent) == (80, 20)
    for step in (0, EPOCH - 1, EPOCH, 2 * EPOCH + 3, RUN - 1):
        progress = step // EPOCH * EPOCH / RUN
        inputs = draw(step)
        np.testing.assert_allclose(inputs.kept_percent, 80 + 20 * progress, rtol=1e-6)
        np.testing.assert_allclose(
            inputs.contrast_percent, 20 - 20 * progress, rtol=1e-6
        )


def test_u2pls_coin_is_of_the_step_and_its_boxes_of_a_place_in_the_group():
    draw, method = _drawing("u2pl")
    (mask,) = map(np.asarray, _over_steps(draw, ["mask"]))
    mixed = mask.any(axis=(1, 2, 3))
    assert (mask.any(axis=(2, 3)) == mixed[:, None]).all()
    # Half of the steps: 96 coins deviate by 5 from 48.
    assert 30 < mixed.sum() < 66
    by_place = mask.reshape(STEPS, -1, method.group_size, *mask.shape[2:])
    assert (by_place == by_place[:, :1]).all()
    assert (by_place[mixed, 0, 0] != by_place[mixed, 0, 1]).any(
        axis=(1, 2)
    ).mean() > 0.8
    area = mask[mixed].mean(axis=(2, 3))
    np.testing.assert_allclose(area, 0.5, atol=0.02)


@pytest.mark.parametrize("method", ["u2pl", "ael"])
def test_no_two_passes_or_examples_share_a_mask(method):
    draw, built = _drawing(
        method, _memory if method == "ael" else lambda method: None, model__width=64
    )
    inputs = draw(0)
    passes = [getattr(inputs, "teacher_decoder_dropout", None), inputs.decoder_dropout]
    rows = [np.asarray(mask).reshape(len(mask), -1) for mask in jax.tree.leaves(passes)]
    for name, channels in built.dropout_channels:
        assert channels >= 128, name  # so that chance makes no two alike
    for channels in {row.shape[1] for row in rows}:
        alike = np.concatenate([row for row in rows if row.shape[1] == channels])
        assert len(np.unique(alike, axis=0)) == len(alike)
        np.testing.assert_allclose(np.unique(alike), [0, 1 / 0.9], rtol=1e-6)
        assert 0.05 < (alike == 0).mean() < 0.15


def _memory(method):
    """Requests whose classes tell their row, and confidences far apart."""
    memory = method.init(jax.random.key(1))
    rows, groups = memory.label.shape
    label = jnp.asarray((np.arange(rows)[:, None] + np.arange(groups)) % tiny.CLASSES)
    confidence = jnp.tile(jnp.asarray([0.0, 1.0, 0.2, 0.9]), (groups, 1))
    return memory.replace(label=label.astype(jnp.int32), confidence=confidence)


def test_ael_cuts_out_the_class_that_its_partner_was_chosen_for():
    draw, method = _drawing("ael", _memory)
    stored = np.asarray(_memory(method).label)
    wanted, slot, seen = _over_steps(draw, ["wanted", "slot", "seen"])
    for step in range(STEPS):
        assert slot[step] == step % method.delay
        np.testing.assert_array_equal(wanted[step], stored[step % method.delay])
    # The next partners' classes are drawn afresh, by softmax(1 - confidence).
    shares = np.bincount(np.ravel(seen.label), minlength=tiny.CLASSES) / seen.label.size
    expected = np.exp(1 - np.asarray([0.0, 1.0, 0.2, 0.9]))
    deviation = 0.5 / np.sqrt(seen.label.size)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=4 * deviation)


def test_aels_fields_are_of_a_group_and_a_step():
    draw, _ = _drawing("ael", _memory)
    first, second = draw(0), draw(1)
    names = ("object_draw", "box_draw")
    for one in [*(getattr(first, name) for name in names), *first.survival]:
        flat = np.asarray(one).reshape(len(one), -1)
        assert len(np.unique(flat, axis=0)) == len(flat)
        assert flat.min() >= 0 and flat.max() < 1
    fields = np.asarray(first.survival[0])
    assert fields.shape[1] == tiny.CLASSES
    assert len(np.unique(fields[0].reshape(tiny.CLASSES, -1), axis=0)) == tiny.CLASSES
    assert not np.array_equal(first.survival[1], second.survival[1])
    np.testing.assert_array_equal(draw(0).survival[1], first.survival[1])


def test_a_class_is_drawn_by_what_its_confidence_lacks():
    confidence = jnp.asarray([0.1, 0.5, 1.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(memory_bank.draw_label, in_axes=(0, None))(keys, confidence)
    expected = np.exp(1 - np.asarray(confidence))
    shares = np.bincount(drawn, minlength=3) / len(keys)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)


def test_aels_bytes_are_of_what_was_seen_and_of_the_survival_fields():
    found = AEL.memory(pixels=1000, positions=1, groups=2)
    seen = 2 * AEL.groups * AEL.num_classes * AEL.num_unlabeled
    assert found == {
        "train.batch_size": seen,
        "data.crop": 4 * 2 * AEL.num_classes * 1000,
    }


class Noted(Keys):
    """Keys that note every stream asked for, with its kind."""

    asked: list = []

    def shared(self, name):
        self.asked.append(("shared", name))
        return super().shared(name)

    def examples(self, name):
        self.asked.append(("examples", name))
        return super().examples(name)

    def groups(self, name):
        self.asked.append(("groups", name))
        return super().groups(name)


@pytest.mark.parametrize("name", METHODS)
def test_no_two_streams_of_a_method_share_a_key(name, monkeypatch):
    """Neither of records, groups and steps, nor at the next step."""
    cfg = tiny.config(f"method={name}")
    method = tiny.setup(cfg).step.method
    batch = tiny.batch(0, cfg, method)
    groups = cfg.train.batch_size // cfg.train.group_size
    monkeypatch.setattr(Noted, "asked", [])

    def keys(step):
        return Noted(
            root=jax.random.key(cfg.seed),
            step=jnp.asarray(step),
            example=jnp.arange(cfg.train.batch_size),
            group=jnp.arange(groups),
            progress=jnp.zeros(()),
        )

    for epoch in (0, 1):  # of a warm-up, and after it
        phase = dataclasses.replace(method, network_dropout=True).phase(epoch)
        state = phase.init(jax.random.key(0))
        first = len(Noted.asked)
        jax.eval_shape(
            lambda batch, p=phase, s=state: p.augment(batch, s, keys(0)), batch
        )
        asked = Noted.asked[first:]
        assert asked and len(set(asked)) == len(asked)
        drawn = []
        for step in (0, 1):
            for kind, stream in asked:
                found = getattr(keys(step), kind)(stream)
                if kind == "shared":  # what is drawn for a place in the group
                    found = jax.random.split(found, cfg.train.batch_size)
                drawn.append(jax.random.key_data(found).reshape(-1, 2))
        drawn = np.concatenate(drawn)
        assert len(np.unique(drawn, axis=0)) == len(drawn)


class _NotesKeys:
    """A network whose decoder notes its keys."""

    module = None
    keys: Any = None

    def decode(self, features, decoder_dropout=None, passes=1):
        assert decoder_dropout is None and passes == 1
        self.keys = features.dropout_keys
        images = features.taps["last"]
        return Prediction(logits=images, decoder=images), self


def test_perturbed_features_have_keys_that_no_layer_derives_from_the_clean_ones():
    """Layers fold their small numbers into the keys of their images."""
    draw, method = _drawing("unimatch")
    assert isinstance(method, UniMatch)
    inputs = draw(0)
    count = 2 * len(inputs.image)
    keys = jax.random.split(jax.random.key(3), count)
    ones = jnp.ones((count, 1, 1, 3))
    student: Any = _NotesKeys()
    images = jnp.concatenate([inputs.image, inputs.weak])
    method._decode_weak(
        student,
        Features({"last": images}, images.shape[1:3], keys),
        inputs.replace(perturbation={"last": ones}),
    )
    clean, perturbed = np.split(jax.random.key_data(student.keys), 2)
    np.testing.assert_array_equal(clean, jax.random.key_data(keys))
    derived = jax.vmap(lambda i: jax.vmap(lambda k: jax.random.fold_in(k, i))(keys))
    known = jax.random.key_data(derived(jnp.arange(100))).reshape(-1, 2)
    together = np.concatenate([clean, perturbed, known])
    assert len(np.unique(together, axis=0)) == len(together)
