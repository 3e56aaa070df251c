"""Layers against oracles: batch norm, resizing, max-pooling, 1x1 convolution."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models import layers, normalization
from mpmc_jax.models import platform as platforms
from mpmc_jax.models.encoders.resnet import max_pool
from mpmc_jax.models.layers import BatchNorm, Conv, ConvSpec
from mpmc_jax.models.resize import resize_align_corners
from tests.support.x64 import run_x64

KEY = jax.random.key(0)


def batch_norm_oracle(x, scale, bias, mean, var):
    """PyTorch's rule in float64: (output, new running mean, new running variance)."""
    x = np.asarray(x, np.float64)
    batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    count = x.size // x.shape[-1]
    out = (x - batch_mean) / np.sqrt(batch_var + 1e-5) * scale + bias
    unbiased = batch_var * count / (count - 1)
    return out, 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * unbiased


# A mean far above the deviation: E[x^2] - E[x]^2 would lose the variance.
@pytest.mark.parametrize(("offset", "deviation"), [(0.5, 2.0), (30.0, 0.01)])
def test_batch_norm_normalizes_and_moves_statistics_as_pytorch(offset, deviation):
    noise = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    x = np.float32(offset + deviation * noise)
    params = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    stats = {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 1.7)}
    out, moved = BatchNorm().apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )
    leaves = [*params.values(), *stats.values()]
    expected = batch_norm_oracle(x, *map(np.asarray, leaves))
    # float32 resolves a deviation of 0.01 at 30 to 2e-4.
    np.testing.assert_allclose(out, expected[0], atol=1e-5 if offset < 1 else 5e-3)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], expected[1], rtol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["var"], expected[2], rtol=1e-6)


def test_batch_norm_evaluates_with_running_statistics():
    x = jax.random.normal(KEY, (1, 2, 2, 1))
    stats = {"mean": jnp.array([2.0]), "var": jnp.array([4.0])}
    params = {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}
    out = BatchNorm().apply({"params": params, "batch_stats": stats}, x, train=False)
    np.testing.assert_allclose(out, (x - 2) / np.sqrt(4 + 1e-5) * 3 + 1, rtol=1e-5)


def synchronization_errors() -> dict[str, float]:
    """Four devices under pmap against one: output, gradient, statistics."""
    x = 3 + jax.random.normal(KEY, (8, 3, 4, 5), jnp.float64)
    weights = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
    variables = BatchNorm().init(KEY, x, train=False)
    variables = jax.tree.map(lambda v: v.astype(jnp.float64), variables)

    def loss(x, weights, axis_name):
        out, moved = BatchNorm(axis_name).apply(
            variables, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(weights * jnp.sin(out)), (out, moved)

    def run(x, weights, axis_name=None):
        gradient_fn = jax.grad(loss, has_aux=True)
        gradient, (out, moved) = gradient_fn(x, weights, axis_name)
        return gradient, out, moved

    split = (4, 2, *x.shape[1:])
    one = run(x, weights)
    four = jax.pmap(lambda x, w: run(x, w, "d"), axis_name="d")(
        x.reshape(split), weights.reshape(split)
    )

    def error(a, b):
        return float(jnp.abs(a - b).max())

    moved = jax.tree.map(lambda a, b: error(a, b[0]), one[2], four[2])["batch_stats"]
    return {
        "gradient": error(one[0], four[0].reshape(x.shape)),
        "output": error(one[1], four[1].reshape(x.shape)),
        **moved,
    }


def test_batch_norm_is_synchronized_over_devices():
    errors = run_x64(
        "import json\nfrom tests.models.test_layers import synchronization_errors\n"
        "print(json.dumps(synchronization_errors()))"
    )
    assert set(errors) == {"gradient", "output", "mean", "var"}
    assert np.max(list(errors.values())) < 1e-12, errors


# Activation's slope, and whether there is a shortcut.
ENDINGS = [(None, False), (0.0, False), (0.01, False), (0.0, True)]


def norm_errors(platform: str, dtype: str, offset: float) -> dict[str, float]:
    """A form of batch norm against the textbook formula and its autodiff."""
    x = offset + 2 * jax.random.normal(KEY, (2, 3, 4, 5), jnp.float64)
    weights = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
    added = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)
    scale, bias = jnp.linspace(-1.0, 2.0, 5), jnp.linspace(0.3, -0.2, 5)

    def textbook(x, added, scale, bias, slope):
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        out = (x - mean) / jnp.sqrt(var + 1e-5) * scale[None, None, None]
        out = out + bias[None, None, None] + (0 if added is None else added)
        return out if slope is None else jnp.where(out > 0, out, slope * out)

    def ours(x, added, scale, bias, slope):
        form, center = normalization.Form(None, slope), jnp.ones(5)
        return normalization.normalize_by_batch(form, x, added, scale, bias, center)[0]

    def values(norm, dtype, slope, has_shortcut):
        given = [x, added if has_shortcut else None, scale, bias]
        given = jax.tree.map(lambda leaf: leaf.astype(dtype), given)

        def loss(*arguments):
            out = norm(*arguments, slope)
            return jnp.sum(weights.astype(dtype) * jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*given)

    with platforms.compiled_for(platform):
        found = [values(ours, dtype, *ending) for ending in ENDINGS]
    expected = [values(textbook, "float64", *ending) for ending in ENDINGS]
    errors = {}
    for ending, one, other in zip(ENDINGS, found, expected, strict=True):
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one, other)
        errors[str(ending)] = float(max(jax.tree.leaves(differences)))
    return errors


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_batch_norm_has_the_gradient_of_its_formula(platform):
    errors = run_x64(
        "import json\nfrom tests.models.test_layers import norm_errors\n"
        f"exact = norm_errors({platform!r}, 'float64', 3.0)\n"
        f"single = norm_errors({platform!r}, 'float32', 3.0)\n"
        "print(json.dumps([exact, single]))"
    )
    exact, single = errors
    assert len(exact) == len(ENDINGS)
    assert max(exact.values()) < 1e-12, exact
    assert max(single.values()) < 1e-5, single


def joined_errors(platform: str) -> dict[str, float]:
    """Three passes of four images, as one batch on two devices, against a row."""
    x = 3 + 2 * jax.random.normal(KEY, (3, 2, 2, 3, 4, 5), jnp.float64)
    added, weights = jax.random.normal(jax.random.key(1), (2, *x.shape), jnp.float64)
    params = {"scale": jnp.linspace(-1.0, 2.0, 5), "bias": jnp.linspace(0.3, -0.2, 5)}
    stats = {"mean": jnp.ones(5), "var": jnp.full(5, 0.5)}

    def apply(module, params, stats, x, added):
        variables = {"params": params, "batch_stats": stats}
        out, moved = module.apply(
            variables, x, added, train=True, mutable=["batch_stats"]
        )
        return out, moved["batch_stats"]

    def in_a_row(params, x, added):
        module, moved, outs = BatchNorm(slope=0.0), stats, []
        for each, shortcut in zip(x, added, strict=True):
            flat = (a.reshape(4, *a.shape[2:]) for a in (each, shortcut))
            out, moved = apply(module, params, moved, *flat)
            outs.append(out.reshape(each.shape))
        return jnp.stack(outs), moved

    @functools.partial(jax.pmap, axis_name="d", in_axes=(None, 1, 1, 1))
    def on_devices(params, x, added, weights):
        def loss(params, x, added):
            flat = (a.reshape(6, *a.shape[2:]) for a in (x, added))
            with normalization.in_passes(3):
                out, moved = apply(BatchNorm("d", 0.0), params, stats, *flat)
            out = out.reshape(x.shape)
            return jnp.sum(weights * jnp.sin(out)), (out, moved)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, added)

    def loss(params, x, added):
        out, moved = in_a_row(params, x, added)
        return jnp.sum(weights * jnp.sin(out)), (out, moved)

    expected = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, added)
    with platforms.compiled_for(platform):
        (d_params, dx, d_added), (out, moved) = on_devices(params, x, added, weights)
    maps = (jnp.moveaxis(each, 0, 1) for each in (dx, d_added))
    d_params = jax.tree.map(lambda each: each.sum(0), d_params)
    moved = jax.tree.map(lambda each: each[0], moved)
    found = (d_params, *maps), (jnp.moveaxis(out, 0, 1), moved)
    differences = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), found, expected
    )
    return {
        jax.tree_util.keystr(path): each
        for path, each in jax.tree_util.tree_leaves_with_path(differences)
    }


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_passes_in_one_batch_are_normalized_as_in_a_row(platform):
    errors = run_x64(
        "import json\nfrom tests.models.test_layers import joined_errors\n"
        f"print(json.dumps(joined_errors({platform!r})))"
    )
    assert len(errors) == 7  # two parameters, two maps; result, mean, variance
    assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("slope", "has_shortcut"), ENDINGS)
def test_a_folded_norm_equals_one_of_its_own(use_bias, slope, has_shortcut):
    keys = iter(jax.random.split(KEY, 20))
    module = layers.ConvNorm(ConvSpec(6, 3), use_bias=use_bias, slope=slope)
    x = 3 + jax.random.normal(next(keys), (2, 5, 4, 3))
    shortcut = jax.random.normal(next(keys), (2, 5, 4, 6)) if has_shortcut else None
    variables = module.init(KEY, x, train=False)
    # Variances and scales must be positive.
    variables = jax.tree.map(
        lambda leaf: leaf + 2 * jax.random.uniform(next(keys), leaf.shape), variables
    )

    evaluated = jax.jit(functools.partial(module.apply, train=False))
    expected = evaluated(variables, x, shortcut)
    with platforms.compiled_for("gpu"):
        found = evaluated(variables, x, shortcut)
        made = jax.eval_shape(lambda: module.init(KEY, x, train=False))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(made) == jax.tree.structure(variables)


def test_bfloat16_input_keeps_float32_parameters_and_statistics():
    x = (100 + jax.random.normal(KEY, (4, 8, 8, 3))).astype(jnp.bfloat16)
    module = layers.ConvNorm(ConvSpec(6, 3))
    variables = module.init(KEY, x, train=True)
    out, moved = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.float32(out)).all()
    for leaf in jax.tree.leaves((variables["params"], moved)):
        assert leaf.dtype == jnp.float32


def resize_oracle(x, size):
    """Align-corners bilinear interpolation, position by position."""
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            r, c = (
                k * (n - 1) / (m - 1) if m > 1 else 0.0
                for k, n, m in zip((i, j), x.shape[1:3], size, strict=True)
            )
            r0, c0 = int(r), int(c)
            r1, c1 = min(r0 + 1, x.shape[1] - 1), min(c0 + 1, x.shape[2] - 1)
            top = x[:, r0, c0] * (1 - c + c0) + x[:, r0, c1] * (c - c0)
            low = x[:, r1, c0] * (1 - c + c0) + x[:, r1, c1] * (c - c0)
            out[:, i, j] = top * (1 - r + r0) + low * (r - r0)
    return out


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (1, 5), (9, 2)])
@pytest.mark.parametrize("size", [(9, 6), (1, 1), (4, 7)])
def test_resize_agrees_with_interpolation_by_hand(shape, size):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    out = resize_align_corners(jnp.asarray(x), size)
    assert out.shape == (2, *size, 3)
    np.testing.assert_allclose(out, resize_oracle(x, size), atol=1e-6)


def test_resize_keeps_corners_and_its_gradient_sums_to_the_output_size():
    x = jax.random.normal(KEY, (1, 5, 4, 2))
    out = resize_align_corners(x, (13, 10))
    np.testing.assert_allclose(out[:, ::12, ::9], x[:, ::4, ::3], atol=1e-6)
    gradient = jax.grad(lambda x: resize_align_corners(x, (13, 10)).sum())(x)
    np.testing.assert_allclose(gradient.sum(), 13 * 10 * 2, rtol=1e-5)


def enlarging_errors() -> list[float]:
    """The form for GPUs against the products: results and gradients."""
    whole = [((3, 4), (9, 13)), ((5, 2), (13, 4)), ((2, 2), (3, 3))]
    sizes = [*whole, ((4, 3), (7, 8)), ((5, 5), (5, 6)), ((2, 9), (8, 10))]

    @functools.partial(jax.jit, static_argnames="size")
    def values(x, weights, size):
        def total(x):
            return jnp.sum(weights * jnp.sin(resize_align_corners(x, size)))

        return jax.value_and_grad(total)(x)

    def of_all():
        for source, size in sizes:
            x = np.random.default_rng(0).normal(size=(2, *source, 3))
            weights = np.random.default_rng(1).normal(size=(2, *size, 3))
            text = values.lower(x, weights, size).as_text()
            yield values(x, weights, size), "dot_general" in text

    expected = list(of_all())
    with platforms.compiled_for("gpu"):
        found = list(of_all())
    errors = []
    for (ours, product), (theirs, _) in zip(found, expected, strict=True):
        assert not product
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), ours, theirs)
        errors += [float(leaf) for leaf in jax.tree.leaves(differences)]
    return errors


def test_the_forms_of_enlarging_for_gpus_equal_the_products():
    errors = run_x64(
        "import json\nfrom tests.models.test_layers import enlarging_errors\n"
        "print(json.dumps(enlarging_errors()))"
    )
    assert len(errors) == 12 and max(errors) < 1e-12, errors


def test_the_gradient_of_enlarging_is_rounded_where_asked():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype(np.float32)
    given = np.random.default_rng(1).normal(size=(2, 9, 13, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="dtype")
    def gradient(given, dtype):
        enlarge = functools.partial(
            resize_align_corners, size=(9, 13), gradient_dtype=dtype
        )
        out, back = jax.vjp(enlarge, x)
        return out, back(given)[0]

    rounded = np.asarray(given.astype(jnp.bfloat16).astype(np.float32))
    for platform, taken in (("gpu", rounded), ("cpu", given)):
        with platforms.compiled_for(platform):
            out, found = gradient(given, "bfloat16")
            full, expected = gradient(taken, "float32")
        np.testing.assert_array_equal(out, full)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(rounded - given).max() > 1e-3


def max_pool_errors() -> list[float]:
    """The form for GPUs against XLA's windows, with ties, whose first gets all."""

    @functools.partial(jax.jit, static_argnames="ceil")
    def values(x, ceil):
        def total(x):
            out = max_pool(x, ceil=ceil)
            weights = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
            return jnp.sum(weights * out), out

        return jax.value_and_grad(total, has_aux=True)(x)

    def of_all():
        for size, ceil in itertools.product((4, 5, 6, 7), (False, True)):
            noise = np.random.default_rng(size).normal(size=(2, size, size + 1, 3))
            yield from jax.tree.leaves(values(np.round(2 * noise), ceil))

    expected = list(of_all())
    with platforms.compiled_for("gpu"):
        found = list(of_all())
    return [float(abs(a - b).max()) for a, b in zip(found, expected, strict=True)]


def test_max_pool_for_gpus_equals_xlas():
    errors = run_x64(
        "import json\nfrom tests.models.test_layers import max_pool_errors\n"
        "print(json.dumps(max_pool_errors()))"
    )
    assert len(errors) == 24 and max(errors) < 1e-12, errors


@pytest.mark.parametrize("size", [4, 5, 6, 7])
@pytest.mark.parametrize("ceil", [False, True])
def test_max_pool_rounds_its_size_as_asked(size, ceil):
    x = np.random.default_rng(size).normal(size=(1, size, size, 1)).astype(np.float32)
    out = max_pool(jnp.asarray(x), ceil=ceil)
    rows = (size - 1 + ceil) // 2 + 1
    assert out.shape == (1, rows, rows, 1)
    for i in range(rows):
        for j in range(rows):
            window = x[0, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
            assert out[0, i, j, 0] == window.max()
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, ceil=ceil).sum()))(x)
    assert gradient.sum() == rows**2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [6, 7])
def test_one_by_one_convolution_equals_a_strided_convolution(stride, size):
    x = jax.random.normal(KEY, (2, size, size + 1, 5))
    module = Conv(ConvSpec(4, 1, stride), use_bias=True)
    variables = module.init(KEY, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    out = module.apply(variables, x)
    np.testing.assert_allclose(out, expected + bias[None, None, None], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (2, 4, 4, 8)])
def test_scores_for_gpus_are_products_of_bfloat16_in_float32(shape):
    x, kernel, weights = (
        jax.random.normal(jax.random.fold_in(KEY, i), each, jnp.bfloat16)
        for i, each in enumerate([shape, (1, 1, shape[-1], 5), (*shape[:3], 5)])
    )
    module = layers.Scores(ConvSpec(5), use_bias=True)
    params = {"kernel": kernel.astype(jnp.float32), "bias": jnp.arange(5.0)}

    def weighed(params, x):
        scores = module.apply({"params": params}, x)
        return jnp.sum(scores * weights.astype(scores.dtype)), scores

    gradients = jax.grad(weighed, (0, 1), has_aux=True)
    with platforms.compiled_for("gpu"):
        (of_params, of_x), scores = gradients(params, x)
    expected, exact = gradients(params, x.astype(jnp.float32))
    chex.assert_type([scores, of_x], [jnp.float32, jnp.bfloat16])
    chex.assert_trees_all_close(scores, exact, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(of_params, expected[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(of_x, expected[1].astype(jnp.bfloat16))


def test_convolution_pads_symmetrically_at_stride_two():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 0, 0, 0].set(1.0)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    out = Conv(ConvSpec(1, 3, 2)).apply({"params": {"kernel": kernel}}, x)
    # Padding (1,1) puts the first pixel under the kernel's center.
    assert out.shape == (1, 3, 3, 1)
    assert out[0, 0, 0, 0] == 4.0


def test_initializers_have_pytorchs_spread():
    shape = (3, 3, 64, 128)
    head = layers.torch_uniform(KEY, shape)
    bound = (9 * 64) ** -0.5
    assert np.abs(head).max() <= bound
    np.testing.assert_allclose(np.std(head), bound / np.sqrt(3), rtol=0.02)
    backbone = layers.kaiming_normal_fan_out(KEY, shape)
    np.testing.assert_allclose(np.std(backbone), (2 / (9 * 128)) ** 0.5, rtol=0.02)


def test_batch_norm_of_a_single_value_is_refused():
    """Its output would be the bias, and its running variance go to 0."""
    variables = BatchNorm().init(KEY, jnp.ones((1, 1, 1, 3)), train=False)
    with pytest.raises(ValueError, match="one value per channel.*train.batch_size"):
        BatchNorm().apply(
            variables, jnp.ones((1, 1, 1, 3)), train=True, mutable=["batch_stats"]
        )
