"""Views of other scales and mirrored, centers, and counts whatever the devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.pixels import RGB, PixelFormat
from mpmc_jax.types import Prediction
from tests.support.toy_dataset import NUM_CLASSES, Dataset, Example, make_dataset


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _bilinear(x, size):
    """Between pixel centers, edge repeated: (h,w,c) -> (*size,c)."""
    for axis, wanted in enumerate(size):
        given = x.shape[axis]
        at = (np.arange(wanted) + 0.5) * given / wanted - 0.5
        at = np.clip(at, 0, given - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, given - 1)
        shape = [1] * x.ndim
        shape[axis] = wanted
        part = (at - low).reshape(shape)
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75), (2.0,)])
@pytest.mark.parametrize("name", ["whole", "slide_u2pl", "slide_unimatch"])
def test_views_come_back_and_are_averaged(name, scales, flip):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((14, 19, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 3))

    def network(x):
        """Not symmetric: a column to the left matters."""
        return 2 * (x + jnp.roll(x, 1, 2)) @ jnp.asarray(kernel, jnp.float32)

    protocol = build_protocol(name, 11, scales, flip)
    plain = build_protocol(name, 11)
    scores = np.asarray(protocol.scores(network, jnp.asarray(image)[None]))[0]
    total = []
    for scale in scales:
        size = (round(14 * scale), round(19 * scale))
        view = _bilinear(image, size)
        for mirrored in (False, True)[: 1 + flip]:
            seen = view[:, ::-1] if mirrored else view
            found = plain.scores_of_view(network, jnp.asarray(seen, jnp.float32)[None])
            found = np.asarray(found)[0]
            found = found[:, ::-1] if mirrored else found
            found = _bilinear(found, (14, 19))
            total.append(found if name == "slide_unimatch" else _softmax(found))
    if scales == (1.0,) and not flip and name != "slide_unimatch":
        total = [np.asarray(plain.scores_of_view(network, jnp.asarray(image)[None]))[0]]
    np.testing.assert_allclose(scores, np.mean(total, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (7, 8), (16, 16), (30, 11)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_center_is_cut_and_padded_with_the_mean(shape, dtype):
    pixels = PixelFormat(2, (0.3, 0.7), (1.0, 1.0), dtype, high=(255.0, 51.0))
    rng = np.random.default_rng(0)
    image = rng.integers(1, 50, (*shape, 2)).astype(dtype)
    label = rng.integers(1, 5, shape, dtype=np.uint8)
    size = 12
    protocol = build_protocol("center_crop", size)
    found, labels = protocol.on_canvas(image, label, pixels)
    assert protocol.canvas(shape, 0) == (size, size) == labels.shape
    assert found.dtype == dtype
    expected = np.empty((size, size, 2), dtype)
    expected[:] = np.array([76.5, 35.7]) if dtype == "float32" else [76, 36]
    wanted = np.zeros((size, size), np.uint8)
    for row in range(size):
        for column in range(size):
            at = []
            for side, place in zip(shape, (row, column), strict=True):
                start = (side - size) // 2 if side > size else 0
                offset = (size - side) // 2 if side < size else 0
                at.append(place - offset + start)
            if 0 <= at[0] < shape[0] and 0 <= at[1] < shape[1]:
                expected[row, column] = image[tuple(at)]
                wanted[row, column] = label[tuple(at)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(labels, wanted)


class _Brightest(nn.Module):
    """Logits that are the channels, and two more classes that never win."""

    @nn.compact
    def __call__(self, images):
        shift = self.param("shift", nn.initializers.zeros, ())
        low = jnp.full((*images.shape[:3], NUM_CLASSES - 3), -9.0)
        return Prediction(logits=jnp.concatenate([images + shift, low], -1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("slide_unimatch", marks=pytest.mark.full),
        "slide_u2pl",
        pytest.param("slide_ael", marks=pytest.mark.full),
        "center_crop",
        "whole",
    ],
)
def test_counts_depend_on_neither_devices_nor_batches(name):
    dataset = make_dataset([(24, 30), (18, 26), (24, 30), (24, 30), (24, 30)])
    scales = (1.0,) if name == "slide_unimatch" else (1.0, 1.5)
    variables = _Brightest().init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    found = []
    for batch_size, devices in ((1, 1), (4, 4), (3, 2)):
        evaluator = Evaluator(
            _Brightest(),
            NUM_CLASSES,
            batch_size=batch_size,
            protocol=build_protocol(name, 20, scales, flip=True),
            devices=jax.local_devices()[:devices],
        )
        found.append(evaluator.run(variables, dataset))
    assert found[0].protocol == name
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].confusion, other.confusion)
    pixels = sum((example.label != 255).sum() for example in dataset)
    if name == "center_crop":
        # Padding counts as class 0.
        void = sum((e.label == 255).sum() for e in dataset)
        assert 5 * 400 - void < found[0].confusion.sum() <= 5 * 400
    else:
        assert found[0].confusion.sum() == pixels


def test_center_crops_are_scored_as_cut():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 11, 3), dtype=np.uint8)
    label = rng.integers(0, 3, (6, 11), dtype=np.uint8)
    protocol = build_protocol("center_crop", 8)
    evaluator = Evaluator(_Brightest(), NUM_CLASSES, batch_size=1, protocol=protocol)
    variables = {"params": {"shift": jnp.zeros(())}}
    result = evaluator.run(variables, Dataset([Example("a", image, label)]))
    unit = image[:, 1:9] / 255
    predicted = ((unit - RGB.mean) / np.array(RGB.std)).argmax(-1)
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(expected, (label[:, 1:9], predicted), 1)
    # Two rows of padding: the stored mean is a rounded zero, the same everywhere.
    mean = np.rint(np.array(RGB.mean) * 255) / 255
    padding = ((mean - RGB.mean) / np.array(RGB.std)).argmax()
    expected[0, padding] += 2 * 8
    np.testing.assert_array_equal(result.confusion, expected)
