"""Pooling and the patch classifier."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models import PatchClassifier
from mpmc_jax.models.patch_classifier import ScaleProjection
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.models.pooling import add_pooled, average_pool, multi_scale_pool

KEY = jax.random.key(0)


def pool_oracle(z, window):
    """The mean of every square, zeros beyond the border counted."""
    reach = window // 2
    padded = np.pad(np.float64(z), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    out = np.zeros(z.shape)
    for i in range(z.shape[1]):
        for j in range(z.shape[2]):
            out[:, i, j] = padded[:, i : i + window, j : j + window].mean((1, 2))
    return out


@pytest.mark.parametrize("window", [1, 3, 7, 19])
def test_pooling_equals_the_mean_of_each_square(window):
    z = jax.random.normal(KEY, (2, 9, 23, 3))
    np.testing.assert_allclose(
        jax.jit(average_pool, static_argnums=1)(z, window),
        pool_oracle(np.asarray(z), window),
        atol=1e-6,
    )


def test_gradient_of_pooling_is_pooling_of_the_cotangent():
    z, cotangent = jax.random.normal(KEY, (2, 1, 11, 8, 2))
    weighted = jax.jit(jax.grad(lambda z: jnp.sum(average_pool(z, 7) * cotangent)))
    np.testing.assert_allclose(
        weighted(z), pool_oracle(np.asarray(cotangent), 7), atol=1e-6
    )


def test_pooling_in_bfloat16_rounds_once():
    z = (5 + jax.random.normal(KEY, (1, 25, 25, 2))).astype(jnp.bfloat16)
    exact = jnp.asarray(pool_oracle(np.float64(z), 19), jnp.float32)
    np.testing.assert_array_equal(average_pool(z, 19), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("window", [0, 4, -3])
def test_pooling_refuses_a_window_without_center(window):
    with pytest.raises(ValueError, match="odd and positive"):
        average_pool(jnp.zeros((1, 5, 5, 1)), window)


def test_scales_are_concatenated_in_the_order_given():
    z = jax.random.normal(KEY, (1, 5, 5, 2))
    out = multi_scale_pool(z, (7, 1))
    np.testing.assert_array_equal(out[..., 2:], z)
    np.testing.assert_array_equal(out[..., :2], average_pool(z, 7))
    assert multi_scale_pool(z).shape == (1, 5, 5, 6)


def test_adding_pooled_parts_for_gpus_equals_pooling_each():
    joined, cotangent = jax.random.normal(KEY, (2, 1, 11, 8, 6))

    def weighed(joined):
        out = add_pooled(joined, (1, 7, 19))
        return jnp.sum(out * cotangent[..., :2]), out

    expected = jax.grad(weighed, has_aux=True)(joined)
    with compiled_for("gpu"):
        found = jax.grad(weighed, has_aux=True)(joined)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "windows", "dtype"),
    [
        ("paper", (1, 7, 19), "float32"),
        ("paper", (7,), "bfloat16"),
        ("lite", (1, 7, 19), "bfloat16"),
        ("lite", (19,), "float32"),
    ],
)
def test_head_gives_wide_logits_and_moves_statistics(head, windows, dtype):
    z = jax.random.normal(KEY, (2, 6, 7, 16)).astype(dtype)
    module = PatchClassifier(5, head=head, windows=windows, width=8)
    variables = jax.jit(partial(module.init, train=False))(KEY, z)
    logits = jax.jit(partial(module.apply, train=False))(variables, z)
    assert logits.shape == (2, 6, 7, 5)
    assert logits.dtype == jnp.float32
    train = partial(module.apply, train=True, mutable=["batch_stats"])
    _, moved = jax.jit(train)(variables, z)
    before = jax.tree.leaves(variables["batch_stats"])
    after = jax.tree.leaves(moved["batch_stats"])
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("head", "widths", "first"),
    [("paper", (256, 128, 64), 768), ("lite", (64, 64, 64), 64)],
)
def test_heads_have_the_widths_of_the_design(head, widths, first):
    z = jax.ShapeDtypeStruct((1, 8, 8, 256), jnp.float32)
    module = PatchClassifier(19, head=head)
    shapes = jax.eval_shape(lambda z: module.init(KEY, z, train=False), z)["params"]
    channels = first
    for i, width in enumerate(widths):
        for j, kernel in enumerate((3, 3, 1)):
            conv = shapes[f"block{i}_conv{j}"]["conv"]
            assert set(conv) == {"kernel"}
            assert conv["kernel"].shape == (kernel, kernel, channels, width)
            channels = width
    assert shapes["classifier"]["kernel"].shape == (1, 1, 64, 19)
    assert shapes["classifier"]["bias"].shape == (19,)


def test_projection_before_pooling_equals_projection_of_the_concatenation():
    z = jax.random.normal(KEY, (1, 9, 9, 12))
    module = ScaleProjection(8, (1, 7, 19))
    variables = module.init(KEY, z)
    params = variables["params"]
    kernels = [params[f"window{w}"]["kernel"][0, 0] for w in (1, 7, 19)]
    found = module.apply(variables, z)
    expected = multi_scale_pool(z) @ jnp.concatenate(kernels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "heavy"}, "valid are paper, lite"),
        ({"windows": ()}, r"one or more of \(1, 3, 7, 19\)"),
        ({"windows": (1, 5)}, r"one or more of \(1, 3, 7, 19\)"),
        ({"windows": (7, 7)}, "each once"),
    ],
)
def test_bad_head_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchClassifier(3, **arguments)
