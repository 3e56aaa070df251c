"""Forms of a convolution for CPUs and GPUs against XLA's, and where they are taken."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mpmc_jax.models.convolution import convolve
from mpmc_jax.models.platform import compiled_for
from tests.support.x64 import call_x64

# kernel, stride, dilation, padding, height, width
FORMS = [
    (3, 1, 1, 1, 6, 5),
    (3, 2, 1, 1, 7, 8),
    (3, 2, 2, 2, 9, 6),
    (3, 1, 4, 4, 5, 7),
    (7, 2, 1, 3, 9, 8),
    (3, 1, 1, 0, 6, 4),
    (1, 2, 1, 0, 5, 6),
    (1, 1, 1, 0, 4, 6),
    # Dilated kernels whose outer taps meet little of the picture, or nothing.
    (3, 1, 3, 3, 5, 7),
    (3, 1, 6, 6, 5, 9),
    (3, 2, 3, 3, 7, 8),
    (2, 1, 2, 1, 1, 4),
]


def xla(x, kernel, *, stride, dilation, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def gradients(form, x, kernel, **geometry):
    """Of a loss whose derivative differs at every output value."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(form(x, kernel, **geometry)))

    return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)


def inputs(size, height, width, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 3), dtype)
    return x, jax.random.normal(jax.random.key(1), (size, size, 3, 4), dtype) / size


@functools.cache
def gradients_of_forms(form, platform="cpu", dtype=jnp.float32):
    """Of every one of `FORMS`, in one program: it compiles faster than one for each."""
    shapes = [(size, height, width) for size, *_, height, width in FORMS]
    arrays = [inputs(*shape, dtype) for shape in shapes]

    def run(arrays):
        return [
            gradients(form, *pair, stride=stride, dilation=dilation, padding=padding)
            for pair, (_, stride, dilation, padding, *_) in zip(
                arrays, FORMS, strict=True
            )
        ]

    with compiled_for(platform):
        return jax.device_get(jax.jit(run)(arrays))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("number", range(len(FORMS)), ids=lambda i: str(FORMS[i]))
def test_gradients_are_those_of_xla(number, platform):
    values, expected = (
        gradients_of_forms(*form)[number] for form in ((convolve, platform), (xla,))
    )
    chex.assert_trees_all_close(values, expected, rtol=1e-5, atol=1e-5)


def gradient_errors() -> list[float]:
    """The largest difference to XLA's gradients of each platform, in float64."""

    def leaves(form, platform="cpu"):
        return jax.tree.leaves(gradients_of_forms(form, platform, jnp.float64))

    wanted, errors = leaves(xla), []
    for platform in ("cpu", "gpu"):
        pairs = zip(leaves(convolve, platform), wanted, strict=True)
        errors.append(max(float(abs(a - b).max()) for a, b in pairs))
    return errors


def test_gradients_are_exact_in_float64():
    errors = call_x64("tests.models.test_convolution", "gradient_errors()")
    assert len(errors) == 2 and max(errors) < 1e-12, errors


@pytest.mark.parametrize("dilation", [2, 6, 18])
def test_gpus_meet_no_window_as_large_as_the_image(dilation):
    x, kernel = inputs(3, 21, 21)
    geometry = {"stride": 1, "dilation": dilation, "padding": dilation}

    def windows(form):
        """Sides of the windows that move by more than one position."""

        def loss(x, kernel):
            return jnp.sum(form(x, kernel, **geometry) ** 2)

        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
        text = traced.lower(lowering_platforms=("cuda",)).as_text("hlo")
        return re.findall(r"window=\{size=(\d+)x\d+ stride=", text)

    # The gradient of a dilated kernel, of which cuDNN knows nothing.
    assert windows(xla) == ["21"]
    with compiled_for("gpu"):
        assert windows(convolve) == []


def test_bfloat16_stays_bfloat16():
    x, kernel = inputs(3, 6, 5, jnp.bfloat16)
    geometry = {"stride": 1, "dilation": 1, "padding": 1}
    expected = gradients(xla, x, kernel, **geometry)
    values = gradients(convolve, x, kernel, **geometry)
    chex.assert_type(values, jnp.bfloat16)
    chex.assert_trees_all_close(values, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("platform", "lowered_for"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_accelerators_get_xlas_convolution(platform, lowered_for):
    x, kernel = inputs(3, 6, 5)

    def lowered(form):
        def loss(x, kernel):
            return jnp.sum(form(x, kernel, stride=2, dilation=1, padding=1) ** 2)

        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
        return traced.lower(lowering_platforms=(lowered_for,)).as_text()

    assert lowered(convolve) != lowered(xla), "the CPU's form is XLA's: nothing tested"
    with compiled_for(platform):
        assert lowered(convolve) == lowered(xla)


def test_what_was_traced_for_the_cpu_is_not_met_again():
    x, kernel = inputs(3, 6, 5)
    # As networks have it: a part that is jitted, and traced once.
    part = jax.jit(functools.partial(convolve, stride=1, dilation=1, padding=1))

    def products():
        loss = jax.grad(lambda kernel: jnp.sum(part(x, kernel) ** 2))
        return jax.jit(loss).lower(kernel).as_text().count("dot_general")

    on_cpu = products()
    with compiled_for("tpu"):
        assert products() == 0
    assert products() == on_cpu > 0


def test_shifted_inputs_wait_for_their_gradient():
    layers, shape = 8, (2, 64, 64, 8)
    kernels = jnp.zeros((layers, 3, 3, 8, 8))

    def loss(kernels):
        x = jnp.ones(shape)
        for kernel in kernels:
            x = jnp.sin(convolve(x, kernel, stride=1, dilation=1, padding=1))
        return jnp.sum(x)

    compiled = jax.jit(jax.grad(loss)).lower(kernels).compile()
    held = compiled.memory_analysis().temp_size_in_bytes / (4 * 2 * 64 * 64 * 8)
    # Two maps a layer, and the shifted inputs of one row of taps; not nine maps more
    # a layer.
    assert held < 2 * layers + 3 * 3
