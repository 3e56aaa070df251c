"""Windows where they were published, scores averaged as they were, views brought back.

A network that returns its input's coordinates shows where each of its outputs went.
"""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mpmc_jax.evaluation import windows
from mpmc_jax.evaluation.protocols import PROTOCOLS, build_protocol

CITYSCAPES = (1024, 2048)
SLIDES = ("slide_unimatch", "slide_u2pl", "slide_ael")


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        (
            801,
            [(0, 801), (534, 490)],
            [(0, 801), (534, 801), (1068, 801), (1602, 446)],
        ),
        (
            800,
            [(0, 800), (533, 491)],
            [(0, 800), (533, 800), (1066, 800), (1599, 449)],
        ),
    ],
)
def test_truncated_windows_of_cityscapes(size, rows, columns):
    assert windows.truncated_spans(CITYSCAPES[0], size) == rows
    assert windows.truncated_spans(CITYSCAPES[1], size) == columns


def test_shifted_windows_of_cityscapes():
    rows = windows.shifted_spans(CITYSCAPES[0], 769)
    columns = windows.shifted_spans(CITYSCAPES[1], 769)
    assert [start for start, _ in rows] == [0, 255]
    assert [start for start, _ in columns] == [0, 513, 1026, 1279]
    assert {length for _, length in rows + columns} == {769}
    assert len(windows.windows(rows, columns)) == 8


@hypothesis.given(st.integers(1, 200), st.integers(1, 90))
@pytest.mark.parametrize("spans", [windows.truncated_spans, windows.shifted_spans])
def test_windows_cover_every_pixel_and_stay_inside(spans, side, size):
    seen = np.zeros(side, int)
    for start, length in spans(side, size):
        assert 0 <= start < start + length <= side and length <= size
        seen[start : start + length] += 1
    assert (seen > 0).all()


def coordinates(shape):
    """(1,h,w,2): row and column of each pixel."""
    return np.stack(np.mgrid[: shape[0], : shape[1]], -1)[None].astype(np.float32)


def places(name, shape, size):
    """(top, left, height, width) of every window, spelled out."""
    found = []
    step = 2 * size // 3 if name == "slide_unimatch" else -(-2 * size // 3)
    for top in range(0, shape[0], step):
        for left in range(0, shape[1], step):
            if name == "slide_unimatch":
                height, width = min(size, shape[0] - top), min(size, shape[1] - left)
                found.append((top, left, height, width))
            else:
                at = (min(top, shape[0] - size), min(left, shape[1] - size))
                found.append((*at, size, size))
    return sorted(set(found))


@pytest.mark.parametrize(
    ("name", "size"),
    [("slide_unimatch", 801), ("slide_unimatch", 800), ("slide_u2pl", 769)],
)
def test_coordinates_come_back_to_their_places(name, size):
    """What each window says of the whole image agrees, so the average is it."""
    image = coordinates(CITYSCAPES)
    seen = []

    def network(x):
        seen.append((int(x[0, 0, 0, 0]), int(x[0, 0, 0, 1]), *x.shape[1:3]))
        return x / 1024

    scores = np.asarray(build_protocol(name, size).scores(network, jnp.asarray(image)))
    assert sorted(seen) == places(name, CITYSCAPES, size)
    expected = image / 1024
    if name == "slide_unimatch":
        expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", SLIDES)
@pytest.mark.parametrize(("shape", "size"), [((37, 52), 21), ((24, 31), 24)])
def test_windows_that_disagree_are_averaged(name, shape, size):
    """A network of the place within the window: another at every window."""

    def network(x):
        rows, columns = x.shape[1:3]
        own = jnp.asarray(coordinates((rows, columns)))
        return jnp.concatenate([own, x[..., :1] * own[..., 1:] / 10], -1)

    image = coordinates(shape)
    scores = build_protocol(name, size).scores(network, jnp.asarray(image))
    total, count = np.zeros((*shape, 3)), np.zeros((*shape, 1))
    for top, left, height, width in places(name, shape, size):
        at = (slice(top, top + height), slice(left, left + width))
        found = np.asarray(network(image[:, *at]), np.float64)[0]
        total[at] += found if name == "slide_u2pl" else _softmax(found)
        count[at] += 1
    assert count.max() >= 2
    np.testing.assert_allclose(np.asarray(scores)[0], total / count, rtol=1e-4)


def test_logits_and_probabilities_choose_differently():
    """Where windows disagree, what is averaged matters: the names are no synonyms."""

    def network(x):
        """Three windows mildly for class 0, the first one strongly against it."""
        is_first = (x[:, :1, :1] == 0).all(-1, keepdims=True)
        score = jnp.where(is_first, -12.0, 1.0) * jnp.ones_like(x[..., :1])
        return jnp.concatenate([score, jnp.zeros_like(score)], -1)

    image = jnp.asarray(coordinates((9, 9)))
    found = {
        name: np.asarray(build_protocol(name, 6).scores(network, image)).argmax(-1)
        for name in SLIDES
    }
    different = found["slide_u2pl"] != found["slide_ael"]
    assert different[0, 3:6, 3:6].all() and different.sum() == 9


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_image_no_larger_than_a_window_is_seen_once(name):
    image = jnp.asarray(np.random.default_rng(0).random((2, 12, 12, 3)), jnp.float32)
    seen = []

    def network(x):
        seen.append(x.shape)
        return x

    size = 18 if name.startswith("slide") else 12
    scores = np.asarray(build_protocol(name, size).scores(network, image))
    expected = _softmax(np.asarray(image))
    if name not in ("slide_unimatch", "slide_ael"):
        expected = np.asarray(image)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    # Truncated windows begin a stride apart to the end, whatever is left there.
    assert seen[0] == (2, 12, 12, 3)
    assert len(seen) == (1 if name != "slide_unimatch" else len(seen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slide", 9), "eval.protocol='slide' is unknown; valid: whole, slide_unim"),
        (("slide_ael", 0), "size of windows is 0; set data.crop"),
        (("whole", 9, ()), "eval.scales=.*above 0"),
        (("whole", 9, (1.0, -0.5)), "eval.scales=.*above 0"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_protocol(*arguments)


@pytest.mark.parametrize("views", [{}, {"scales": (0.5, 1.0), "flip": True}])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_probabilities_sum_to_one_and_rank_as_the_scores(name, views):
    protocol = build_protocol(name, 9, **views)
    images = np.random.default_rng(0).normal(size=(1, 12, 16, 3)).astype(np.float32)

    def network(images):
        return 3 * images

    scores = protocol.scores(network, jnp.asarray(images))
    found = np.asarray(protocol.to_probabilities(scores))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found.argmax(-1), np.argmax(scores, -1))
    if name == "whole" and not views:
        expected = np.exp(3 * images) / np.exp(3 * images).sum(-1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
