"""Dice, HD95 and ASD of volumes: against brute force, absent classes, real ACDC."""

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.evaluation.volumes import VolumeScores, score_class, score_volume
from mpmc_jax.pixels import GRAY
from mpmc_jax.types import Prediction
from tests.support.toy_dataset import Dataset, Example

NAMES = ("background", "ventricle", "muscle", "chamber")


def _surface(mask):
    """Voxels with a neighbor, of six, that is outside of the mask or of the array."""
    found = []
    for at in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = at.copy()
                other[axis] += step
                inside = (other >= 0).all() and (other < mask.shape).all()
                if not inside or not mask[tuple(other)]:
                    found.append(tuple(at))
    return np.array(sorted(set(found)))


def _by_hand(prediction, truth):
    a, b = _surface(prediction), _surface(truth)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = distance.min(1), distance.min(0)
    dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    return dice, np.percentile([*there, *back], 95), there.mean()


@hypothesis.given(
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.floats(0.1, 1.0),
    st.floats(0.1, 1.0),
    st.integers(0, 99),
)
def test_figures_agree_with_brute_force(shape, first, second, seed):
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random(shape) < first, rng.random(shape) < second
    prediction.flat[0] = truth.flat[-1] = True
    np.testing.assert_allclose(
        score_class(prediction, truth), _by_hand(prediction, truth), rtol=1e-12
    )


def test_a_perfect_volume_and_a_moved_one():
    truth = np.zeros((4, 12, 12), bool)
    truth[:, 3:9, 2:7] = True
    assert score_class(truth, truth) == (1, 0, 0)
    moved = np.roll(truth, 3, axis=2)
    dice, hd95, asd = score_class(moved, truth)
    assert dice == pytest.approx(2 / 5) and hd95 == 3 and 0 < asd < 3


def test_classes_that_are_absent_leave_the_mean_and_are_counted():
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[:, :2] = 1
    prediction = truth.copy()
    prediction[:, 3] = 2  # Only predicted; class 3 is in neither.
    first = score_volume(prediction, truth, 4)
    np.testing.assert_array_equal(first[0], [1, 0, 0])
    np.testing.assert_array_equal(first[1], [0, np.nan, np.nan])
    np.testing.assert_array_equal(first[2], [np.nan] * 3)
    second = score_volume(np.full_like(truth, 3), np.full_like(truth, 3), 4)
    scores = VolumeScores(np.stack([first, second]))
    np.testing.assert_array_equal(
        scores.means(), [[1, 0, 0], [0, np.nan, np.nan], [1, 0, 0]]
    )
    np.testing.assert_array_equal(scores.undefined(), [[1, 1, 1], [1, 2, 2], [1, 1, 1]])
    figures = scores.scalars(NAMES)
    assert figures["dice"] == pytest.approx(2 / 3) and figures["hd95"] == 0
    assert figures["dice/muscle"] == 0 and "hd95/muscle" not in figures
    assert (figures["dice_left_out"], figures["asd_left_out"]) == (3, 4)
    nothing = VolumeScores(np.full((1, 3, 3), np.nan)).scalars(NAMES)
    assert np.isnan(nothing["dice"])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        score_volume(np.zeros((2, 3, 3), int), np.zeros((3, 3, 3), int), 2)


class _Bands(nn.Module):
    """Classes in bands by the column: logits linear in it, whatever the image."""

    classes: int = 4

    @nn.compact
    def __call__(self, images):
        slope = self.param("slope", nn.initializers.ones, ())
        batch, rows, columns, _ = images.shape
        return Prediction(
            logits=jnp.broadcast_to(
                slope * bands(np.arange(columns), columns, self.classes, jnp),
                (batch, rows, columns, self.classes),
            )
        )


def bands(column, size, classes, library):
    """(w,C) tangents of a parabola: class c wins in the c-th of equal bands."""
    at = (library.asarray(column, dtype=library.float32) / size)[:, None]
    middle = (np.arange(classes, dtype=np.float32)[None] + 0.5) / classes
    return 2 * at * middle - middle**2


def predicted(shape, size, classes=4):
    """What the bands become on slices of another width, in closed form."""
    at = (np.arange(shape[1]) + 0.5) * size / shape[1] - 0.5
    scores = bands(np.clip(at, 0, size - 1), size, classes, np)
    return np.broadcast_to(scores.argmax(-1), shape)


def _volumes(seed=0):
    rng = np.random.default_rng(seed)
    dataset = Dataset()
    for number, (depth, *shape) in enumerate([(3, 20, 30), (2, 24, 18), (4, 20, 30)]):
        for i in range(depth):
            label = np.kron(rng.integers(0, 4, (4, 6)), np.ones((6, 5), int))
            label = np.resize(label, shape).astype(np.uint8)
            image = rng.integers(0, 256, (*shape, 1), dtype=np.uint8)
            dataset.append(Example(f"{number}_{i}", image, label, f"volume{number}"))
    return dataset


def evaluate_bands(dataset, size, devices=4, batch_size=4):
    module = _Bands()
    evaluator = Evaluator(
        module,
        4,
        pixels=GRAY,
        batch_size=batch_size,
        protocol=build_protocol("volume", size),
        devices=jax.local_devices()[:devices],
    )
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    return evaluator.run(variables, dataset)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 3), (4, 4)])
def test_slices_become_volumes_whatever_the_batches(devices, batch_size):
    dataset = _volumes()
    shuffled = Dataset(dataset)
    result = evaluate_bands(shuffled, 17, devices, batch_size)
    assert result.volumes is not None and result.protocol == "volume"
    names = list(dict.fromkeys(example.volume for example in dataset))
    for position, name in enumerate(names):
        slices = [example for example in dataset if example.volume == name]
        truth = np.stack([example.label for example in slices])
        guess = np.stack([predicted(example.label.shape, 17) for example in slices])
        np.testing.assert_allclose(
            result.volumes.values[position], score_volume(guess, truth, 4), atol=1e-12
        )
    table = format_table(result, NAMES)
    assert "ventricle" in table and "volume" in table
    dice = result.scalars(NAMES)["dice"]
    assert dice == pytest.approx(np.nanmean(result.volumes.values[..., 0]))


def test_images_without_volumes_are_refused():
    dataset = _volumes()
    dataset[3].volume = ""
    with pytest.raises(ValueError, match="has no volumes; use 'whole'"):
        evaluate_bands(dataset, 17)
