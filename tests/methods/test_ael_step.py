"""AEL as a whole against slow loops: losses, memory, boxes, copy-paste, partners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods.ael import confidence as ael_confidence
from mpmc_jax.methods.ael import memory_bank
from mpmc_jax.methods.ael.inputs import copy_paste
from mpmc_jax.methods.ael.memory_bank import Seen
from mpmc_jax.types import Batch, Crops
from tests.support.ael_oracle import (
    CLASSES,
    DELAY,
    EXAMPLES,
    GROUPS,
    IMAGES,
    MEMBERS,
    METHOD,
    SIDE,
    losses_oracle,
    run,
    setting,
    teacher_says,
)


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_memory_are_the_oracles(seed):
    method, student, teacher, inputs, memory = setting(seed)
    value, (terms, after), _, (targets, moved) = run(
        method, student, teacher, inputs, memory
    )
    expected, confidence = losses_oracle(
        student, teacher, inputs, targets.mask, memory.confidence
    )
    np.testing.assert_allclose(terms["labeled"], expected[0], rtol=1e-5)
    np.testing.assert_allclose(terms["unlabeled"], expected[1], rtol=1e-5)
    np.testing.assert_allclose(after.confidence, confidence, rtol=1e-5)
    total = (terms["supervised"] + sum(expected)) / GROUPS
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert moved["student"] == 2  # two train-mode passes
    _, first, second = teacher_says(teacher, inputs, targets.mask)
    presence = np.array(memory.presence)
    for group, of_image in enumerate(np.asarray(inputs.seen.image)):
        for image, label in zip(of_image, (first, second), strict=True):
            count = np.bincount(label[group].reshape(-1), minlength=CLASSES)
            presence[group, :, image] = count >= 0.1 * SIDE**2
    np.testing.assert_array_equal(after.presence, presence)
    for group in range(GROUPS):
        wanted = int(inputs.seen.label[group])
        holds = np.flatnonzero(presence[group, wanted])
        holds = np.arange(IMAGES) if not len(holds) else holds
        pick = int(float(inputs.seen.uniform[group]) * len(holds))
        assert after.image[1, group] == holds[pick]
        assert after.label[1, group] == wanted
    others = np.array([0, 2])
    np.testing.assert_array_equal(after.image[others], memory.image[others])


def test_boxes_hold_an_object_of_the_wanted_class_or_half_the_area():
    found = []
    for seed in range(12):
        method, student, teacher, inputs, memory = setting(seed)
        *_, (targets, _) = run(method, student, teacher, inputs, memory)
        _, _, second = teacher_says(teacher, inputs, targets.mask)
        for group in range(GROUPS):
            box = np.asarray(targets.mask[group])
            wanted = second[group] == int(inputs.wanted[group])
            components, _ = ndimage.label(wanted, np.ones((3, 3)))
            tight = [
                np.zeros((SIDE, SIDE), bool) for _ in ndimage.find_objects(components)
            ]
            for mask, place in zip(
                tight, ndimage.find_objects(components), strict=True
            ):
                mask[place] = True
            assert bool(targets.found[group]) == bool(tight)
            found.append(bool(tight))
            if tight:
                assert any((box == mask).all() for mask in tight)
            else:
                assert abs(box.sum() - SIDE**2 / 2) <= SIDE
    assert any(found) and not all(found)


def test_the_fallback_box_has_the_released_sides_and_place():
    box = mixing.fallback_box(jnp.asarray([0.25, 0.5, 1.0]), 100)
    # Sides 84 and 59 (0.5^0.25, 0.5^0.75); row round(16/2), column round(41).
    np.testing.assert_array_equal(box, [8, 41, 92, 100])
    areas = []
    for uniform in np.random.default_rng(0).random((50, 3)):
        top, left, bottom, right = map(
            int, mixing.fallback_box(jnp.asarray(uniform), 64)
        )
        assert 0 <= top < bottom <= 64 and 0 <= left < right <= 64
        areas.append((bottom - top) * (right - left))
    # Rounding moves either side by at most half a pixel.
    np.testing.assert_allclose(areas, 64**2 / 2, rtol=0.03)


def _requests(memory, draws, rng):
    """Partners that `draws` steps in a row ask for, with their classes."""
    remember = jax.jit(memory_bank.remember)
    pairs = []
    for _ in range(draws):
        seen = Seen(
            group=jnp.arange(GROUPS),
            # Images that are seen again hold what they held.
            image=jnp.zeros((GROUPS, 2), int),
            present=memory.presence[:, :, :1].transpose(0, 2, 1).repeat(2, axis=1),
            label=jnp.asarray(rng.integers(0, CLASSES, GROUPS)),
            uniform=jnp.asarray(rng.random(GROUPS), jnp.float32),
        )
        memory = remember(memory, seen, jnp.asarray(0))
        pairs.append((np.asarray(seen.label), np.asarray(memory.image[0])))
    return pairs


def test_partners_hold_the_class_whenever_any_image_does():
    rng = np.random.default_rng(0)
    *_, memory = setting(0)
    presence = rng.random(memory.presence.shape) < 0.25
    presence[:, 3] = False  # a class that no image holds
    memory = memory.replace(presence=jnp.asarray(presence))
    asked = {c: [] for c in range(CLASSES)}
    for labels, images in _requests(memory, 1000, rng):
        for group, (label, image) in enumerate(zip(labels, images, strict=True)):
            held = presence[group, label]
            assert held[image] or not held.any()
            asked[int(label)].append(int(image))
    assert sum(map(len, asked.values())) == 2000
    # Uniform among them: without any, all images come.
    times = np.bincount(asked[3], minlength=IMAGES) / len(asked[3])
    np.testing.assert_allclose(times, 1 / IMAGES, atol=0.06)


def test_requests_are_kept_for_as_many_steps_as_they_wait():
    *_, memory = setting(0)
    assert memory.image.shape == (DELAY, GROUPS)
    for step in range(5):
        np.testing.assert_array_equal(
            METHOD.requested(memory, step), memory.image[step % DELAY]
        )
    assert (memory.image >= 0).all() and (memory.image < IMAGES).all()


def test_queries_follow_the_confidence_and_leave_classes_out():
    confidence = jnp.asarray([[0.0, 0.9, 0.5, 0.0]])
    keys = jax.random.split(jax.random.key(0), 4000)

    def drawn(count):
        each = jax.vmap(
            lambda key: ael_confidence.query(key[None], confidence, count, (0,))[0]
        )
        return np.asarray(jax.jit(each)(keys))

    once = drawn(1)
    assert (once.sum(1) == 1).all()
    scores = np.exp(np.sqrt(1 - np.asarray(confidence[0])))
    scores[0] = 0
    np.testing.assert_allclose(once.mean(0), scores / scores.sum(), atol=0.03)
    thrice = drawn(3)
    assert {1, 2, 3} == set(thrice.sum(1)) and not thrice[:, 0].any()


def test_copy_paste_takes_queried_real_pixels_only():
    rng = np.random.default_rng(0)

    def crops(extent):
        label = rng.integers(0, CLASSES, (EXAMPLES, SIDE, SIDE))
        label = np.where(rng.random(label.shape) < 0.1, 255, label)
        return Crops(
            image=jnp.asarray(rng.integers(0, 256, (*label.shape, 3), np.uint8)),
            extent=jnp.tile(jnp.asarray([extent]), (EXAMPLES, 1)),
            index=jnp.arange(EXAMPLES),
            batch_index=jnp.arange(EXAMPLES),
            label=jnp.asarray(label, jnp.uint8),
        )

    batch = Batch(crops([0, 0, SIDE, 6]), source=crops([2, 0, SIDE, SIDE]))
    queried = rng.random((EXAMPLES, CLASSES)) < 0.5
    image, label, real = copy_paste(batch, jnp.asarray(queried))
    for i, y, x in np.ndindex(EXAMPLES, SIDE, SIDE):
        wanted = int(batch.source.label[i, y, x])
        pasted = y >= 2 and wanted != 255 and queried[i, wanted]
        taken = batch.source if pasted else batch.labeled
        np.testing.assert_array_equal(image[i, y, x], taken.image[i, y, x])
        assert label[i, y, x] == taken.label[i, y, x]
        assert real[i, y, x] == (pasted or x < 6)


def test_a_constant_on_the_scores_changes_nothing():
    method, student, teacher, inputs, memory = setting(1)
    value, *_ = run(method, student, teacher, inputs, memory)
    more = jnp.full((1, 1, 1, 1), 3.0)
    moved, *_ = run(
        method, student.replace(bias=more), teacher.replace(bias=more), inputs, memory
    )
    np.testing.assert_allclose(moved, value, rtol=2e-5)


def test_order_within_a_group_changes_nothing():
    method, student, teacher, inputs, memory = setting(2)
    swap = np.arange(EXAMPLES).reshape(GROUPS, MEMBERS)[:, ::-1].reshape(-1)
    names = ("labeled", "teacher_labeled")
    swapped = inputs.replace(
        image=inputs.image[swap],
        label=inputs.label[swap],
        labeled_real=inputs.labeled_real[swap],
        decoder_dropout=inputs.decoder_dropout
        | {
            name: {"fuse1": inputs.decoder_dropout[name]["fuse1"][swap]}
            for name in names
        },
    )
    value, (_, one), *_ = run(method, student, teacher, inputs, memory)
    again, (_, other), *_ = run(method, student, teacher, swapped, memory)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(other.confidence, one.confidence, rtol=1e-6)


@pytest.mark.parametrize("case", ["plain", "void", "absent", "dropped"])
def test_gradients_are_finite_always(case):
    method, student, teacher, inputs, memory = setting(3, void=case == "void")
    if case == "absent":
        inputs = inputs.replace(label=jnp.minimum(inputs.label, 1))
    if case == "dropped":
        # Re-sampling keeps no pixel: the divisor is 1e-12.
        none = jax.tree.map(lambda x: jnp.full_like(x, -1), inputs.survival)
        inputs = inputs.replace(survival=none)
    value, (terms, after), gradient, _ = run(method, student, teacher, inputs, memory)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    if case == "void":
        assert terms["supervised"] == 0
    if case in ("void", "absent"):
        # What is absent decays.
        gone = slice(None) if case == "void" else slice(2, None)
        np.testing.assert_allclose(
            after.confidence[:, gone], 0.999 * memory.confidence[:, gone], rtol=1e-6
        )
    if case == "dropped":
        assert terms["labeled"] == 0 and terms["unlabeled"] == 0


def test_a_confidence_at_the_threshold_counts():
    _, student, teacher, inputs, memory = setting(5)
    # All classes alike: the certainty is 1/4 everywhere.
    teacher = teacher.replace(matrix=jnp.zeros_like(teacher.matrix))
    for threshold, counted in ((0.25, True), (0.2500001, False)):
        method = dataclasses.replace(METHOD, threshold=threshold)
        _, (terms, _), _, (targets, _) = run(method, student, teacher, inputs, memory)
        assert (np.asarray(targets.label[0]) != 255).all() == counted
        assert (terms["labeled"] > 0) == counted


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unqueried": (0, 1, 2, 3)}, "classes 0 to 3, not all of them"),
        ({"unqueried": (7,)}, "classes 0 to 3"),
        ({"num_unlabeled": 1}, "there are 1"),
        ({"query_classes": 0}, "ael.query_classes=0"),
        ({"object_area": 5.0}, "ael.object_area=5.0: must lie in"),
        ({"scale": -1.0}, "ael.scale=-1.0: must be positive"),
        ({"ema_decay": 1.0}, "method.ema_decay=1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD, **changes)


def test_the_teacher_is_replaced_at_once_and_keeps_its_statistics():
    decays = [METHOD.average_decays(jnp.int32(step), 10) for step in (0, 1, 500)]
    np.testing.assert_allclose([d for d, _ in decays], [0, 0.5, 0.99], rtol=1e-6)
    assert all(stats is None for _, stats in decays)
