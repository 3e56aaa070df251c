"""A run as a program of its own, which predicts without this package.

The program has the weights, the normalization, the network and the run's protocol
inside. It takes images as they are stored and returns the class of every pixel and the
probabilities of all classes. The number of images is free; their size is one that was
chosen, or any.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import export

from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import EvalProtocol
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.types import Array

# Rows and columns of the images; None for any.
Size = tuple[int, int] | None
# Names of jax.export.
PLATFORMS = ("cpu", "cuda", "tpu")
_NEEDED = {"stablehlo": "flatbuffers", "onnx": "jax2onnx"}


def segment(run: Run) -> Callable[[Array], tuple[Array, Array]]:
    """Returns the function from stored images (b,h,w,c) to their segmentation.

    It returns the classes (b,h,w) uint8 and their probabilities (b,h,w,C) float32.
    """
    protocol = make_protocol(run.config).for_prediction()

    def network(images: Array) -> Array:
        return run.module.apply(run.variables, images).logits

    def program(images: Array) -> tuple[Array, Array]:
        inputs = network_input(images, run.facts.pixels)
        scores = protocol.scores(network, inputs)
        classes = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
        return classes, protocol.to_probabilities(scores).astype(jnp.float32)

    return program


def check_size(run: Run, size: Size, *, onnx: bool = False) -> None:
    """Checks that a program can be made for images of this size.

    Raises:
      ValueError: `size` is None, and the network, the protocol or ONNX needs one.
    """
    if size is not None:
        return
    if onnx:
        raise ValueError(
            "--formats=onnx has a model for each size; name the sizes of your images, "
            "as in --size=512x1024"
        )
    protocol = make_protocol(run.config).for_prediction()
    plain = type(protocol) is EvalProtocol and protocol.scales == (1.0,)
    if not plain or protocol.flip or run.module.multiple > 1:
        raise ValueError(
            f"--size=any: {protocol.name!r}, the run's protocol, at scales "
            f"{list(protocol.scales)} on a network of images in multiples of "
            f"{run.module.multiple} needs one size for each program; name the sizes of "
            "your images, as in --size=512x1024"
        )


def to_stablehlo(run: Run, size: Size, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Makes a StableHLO program, to be read by `jax.export.deserialize`.

    Args:
      run: the run.
      size: rows and columns of the images; None for any.
      platforms: on which it can run, of `PLATFORMS`.

    Raises:
      ValueError: see `check_size`; or flatbuffers is not installed.
    """
    check_size(run, size)
    check_installed("stablehlo")
    free = export.symbolic_shape("b,h,w")
    shape = (free[0], *(size or free[1:]), run.facts.pixels.channels)
    images = jax.ShapeDtypeStruct(shape, run.facts.pixels.dtype)
    with compiled_for("any"), _without_folders():
        made = export.export(jax.jit(segment(run)), platforms=platforms)(images)
    return bytes(made.serialize())


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Keeps this machine's folders out of programs, which name the source files."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = jax.config.values[name]
    jax.config.update(name, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(name, before)


def to_onnx(run: Run, size: Size) -> bytes:
    """Makes an ONNX model of the input "images", with the outputs of `segment`.

    Args:
      run: the run.
      size: rows and columns of the images.

    Raises:
      ValueError: `size` is None, or jax2onnx is not installed.
    """
    check_size(run, size, onnx=True)
    assert size is not None  # Checked above.
    jax2onnx = check_installed("onnx")
    shape = (*export.symbolic_shape("b"), *size, run.facts.pixels.channels)
    with compiled_for("any"):
        model = jax2onnx.to_onnx(
            segment(run),
            [jax.ShapeDtypeStruct(shape, run.facts.pixels.dtype)],
            input_names=["images"],
            output_names=["classes", "probabilities"],
        )
    return model.SerializeToString()


def check_installed(form: str) -> ModuleType:
    """Imports and returns the package that only this format needs.

    Raises:
      ValueError: it is not installed.
    """
    name = _NEEDED[form]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--formats={form} needs {name}; docs/export.md says how to install it "
            f"(pip install --no-deps {name})"
        ) from error
