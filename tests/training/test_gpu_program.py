"""What must not be in UniMatch's step for NVIDIA GPUs, in its lowered or compiled text.

The lowered text has every operation as it was traced, and needs no plug-in. What XLA
fuses shows in the compiled text alone.
"""

import importlib.util
import math
import re

import jax
import pytest

from launch.bench import __main__ as bench
from launch.bench.gpu import devices, hlo, program
from mpmc_jax.experiments.build import state_shape
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.training.train_step import make_step, make_step_info
from tests.support import tiny

PLUGIN = importlib.util.find_spec("jax_cuda12_plugin") is not None
WIDEST = 7  # the kernel of ResNet-18's stem
# XLA fuses nothing into these, so that their results are written.
ALONE = ("convolution", "dot", "scatter", "sort", "custom-call", "while")


def writers_of_scores(text: str) -> set[str]:
    """Returns what makes float32 scores of all classes for every pixel of a batch."""
    pixels = tiny.config().train.batch_size * tiny.CROP**2
    found = set()
    for sides, opcode in re.findall(r" = f32\[([\d,]+)\]\S* ([\w\-]+)\(", text):
        *positions, last = map(int, sides.split(","))
        if last == tiny.CLASSES and math.prod(positions) >= pixels:
            found.add(opcode)
    return found


def is_kernel(array: hlo.Array) -> bool:
    """Whether an array is a convolution's kernel, in any order of its axes."""
    sides = [side for side in array.sides if side > 1]
    return len(sides) <= 2 or any(sides.count(side) > 1 for side in (3, WIDEST))


def lowered_step() -> str:
    cfg = tiny.config("method=unimatch,mpmc=recommended", model__dtype="bfloat16")
    with compiled_for("gpu"):
        parts = tiny.setup(cfg, axis_name=None)
        rows = tiny.batch(0, cfg, parts.step.method)
        traced = jax.jit(make_step(parts.step)).trace(
            state_shape(parts), rows, make_step_info(0)
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text("hlo")


def test_the_lowered_step_has_no_wide_window_and_writes_no_full_size_scores():
    text = lowered_step()
    assert len(re.findall(r" convolution\(", text)) > 60
    # Of these, cuDNN knows those that move by one position as gradients of kernels.
    moving = re.findall(r" convolution\(.*window=\{size=(\d+)x\d+ stride=", text)
    assert 0 < max(map(int, moving)) <= WIDEST
    writers = writers_of_scores(text)
    assert "add" in writers and not writers & set(ALONE)
    # Their gradients, which XLA writes, are rounded: one function that all views call.
    rounded = rf"bf16\[\d+,{tiny.CROP},{tiny.CROP},{tiny.CLASSES}\]\S* opt-barrier"
    assert len(re.findall(rounded, text)) == 1


@pytest.mark.full
@pytest.mark.skipif(not PLUGIN, reason="needs the package jax[cuda12]")
def test_the_compiled_step_transposes_and_copies_no_maps_of_the_backbone():
    crop = 129
    settings = "--mpmc=recommended --dtype=bfloat16 --backbone=resnet18"
    args = bench._parser().parse_args([*settings.split(), f"--crop={crop}"])
    config = bench.configuration(args, "unimatch")
    text = program._compile(config, devices.absent_gpus("h100", 1)).as_text()
    kernels = hlo.kernels(text)
    assert 0 < max(kernel.window for kernel in kernels) <= WIDEST
    # As 8 MB are to the maps of crop 801.
    bound = 8e6 * (crop / 801) ** 2
    moved = [
        (kernel.source, kernel.result)
        for kernel in kernels
        if kernel.kind in (hlo.TRANSPOSES, hlo.COPIES)
        and "backbone" in kernel.source
        and kernel.result.bytes > bound
        and not is_kernel(kernel.result)
        # The phases of a dilated kernel, in its gradient.
        and not kernel.source.endswith("(backward)/transpose")
    ]
    assert not moved
