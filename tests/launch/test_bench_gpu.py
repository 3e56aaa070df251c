"""Programs for absent GPUs: the count of their kernels, and its sums."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from launch.bench import __main__ as bench
from launch.bench.gpu import check, devices, hlo, program, roofline
from tests.support import tiny
from tests.support.programs import ROOT

TEXT = (pathlib.Path(__file__).parent.parent / "support/gpu_program.hlo").read_text()
H100 = devices.RATES["h100"]
PLUGIN = importlib.util.find_spec("jax_cuda12_plugin") is not None

# name -> kind, bytes read and written, FLOPs
MAP, KERNEL = 2 * 2 * 64 * 16, 2 * 32 * 9 * 16
QUERIES = 2 * 2 * 10 * 6 * 64
PASS = 2 * (2 * 64 * 32) * 9 * 16
KERNELS = {
    "cudnn-conv.1": ("convolutions", 3 * MAP + KERNEL, PASS),
    "cudnn-conv-bw-input.1": ("convolutions", 3 * MAP + KERNEL, PASS),
    "cudnn-conv-bw-filter.1": ("convolutions", 3 * MAP + KERNEL, PASS),
    "custom-call.1": ("products", MAP + KERNEL + 2 * 128 * 288, 2 * 128 * 288 * 16),
    # Two products of all pairs of ten positions, in six heads of 64 channels.
    "attention.1": ("products", 4 * QUERIES + 4 * 120, 4 * 2 * 6 * 10 * 10 * 64),
    "dot.1": ("products", 2 * 25600 + 40000, 2 * 100 * 100 * 64),
    "input_transpose_fusion": ("transposes", 2 * MAP, 0),
    "input_reduce_fusion.1": ("reductions", MAP + 2 * 64, 0),
    # Ten of a hundred rows are read.
    "loop_multiply_fusion": ("fusions", 2 * 2560 + 256, 0),
    "copy.1": ("copies", 2 * 25600, 0),
    # One row is written in place, and an index read.
    "loop_dynamic_update_slice_fusion": ("fusions", 2 * 256 + 4, 0),
    "all-reduce-start.1": ("collectives", 2 * 40000, 0),
}


def test_kernels_have_their_kind_bytes_and_flops():
    found = {
        each.name: (each.kind, each.bytes, each.flops) for each in hlo.kernels(TEXT)
    }
    assert found == KERNELS


def test_a_loops_body_counts_as_often_as_it_runs():
    runs = {each.name: each.runs for each in hlo.kernels(TEXT)}
    assert runs.pop("loop_dynamic_update_slice_fusion") == 3
    assert set(runs.values()) == {1}


def test_a_program_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.kernels("HloModule nothing")


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_flops():
    def kernel(**settings):
        values = {"bytes": 3.35e9, "flops": 0.0, "operands": "bf16", "exact": False}
        values |= settings
        array = hlo.Array("f32", (1000, 450))
        return hlo.Kernel("products", "", "", array, **values)

    def seconds(devices=1, **settings):
        return roofline.seconds(kernel(**settings), H100, devices)

    assert seconds() == pytest.approx(1e-3)
    assert seconds(flops=989e10) == pytest.approx(1e-2)
    assert seconds(flops=495e10, operands="f32") == pytest.approx(1e-2)
    assert seconds(flops=67e10, operands="f32", exact=True) == pytest.approx(1e-2)
    sent = kernel()._replace(kind="collectives")
    # 1.8 MB, of which seven eighths are sent twice at 450 GB/s.
    assert roofline.seconds(sent, H100, 8) == pytest.approx(7e-6)


def test_figures_are_sums_by_kind_and_by_source():
    found = roofline.figures(hlo.kernels(TEXT), H100, devices=2, top=2)
    assert found["kernels"] == len(KERNELS) + 2
    assert found["flops"] == sum(flops for _, _, flops in KERNELS.values())
    assert found["widest_window"] == 3
    assert found["kinds"]["convolutions"]["kernels"] == 3
    assert sum(kind["seconds"] for kind in found["kinds"].values()) == found["seconds"]
    first, second = found["top"]
    assert first["seconds"] >= second["seconds"]
    gradient = "Net.encode/backbone/layer1_*/conv2/conv_general_dilated (gradient)"
    everything = roofline.figures(hlo.kernels(TEXT), H100, 2, top=20)["top"]
    (row,) = [row for row in everything if row["source"] == gradient]
    assert row["kernels"] == 2 and row["flops"] == 2 * PASS


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("h100:1", ("h100", 1)),
        ("a100:16", ("a100", 16)),
        ("v5e:4x4", None),
        ("", None),
    ],
)
def test_names_of_gpus(topology, expected):
    assert devices.parse_topology(topology) == expected


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h10:1"])
def test_a_gpu_without_a_number_or_unknown_is_one_line(topology):
    with pytest.raises(SystemExit, match=f"{topology}: did you mean 'h100:1'"):
        bench.main(["--what=compile", f"--topology={topology}"])


@pytest.mark.parametrize("name", devices.RATES)
def test_descriptions_agree_with_the_rates(name):
    text = devices._description(name)
    assert f"memory_bandwidth: {devices.RATES[name].memory:.0f}\n" in text
    assert 79e9 < devices.memory_bytes(name) < 160e9


def test_a_missing_plug_in_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--what=compile", "--topology=h100:1"])
    (line,) = str(stopped.value.code).splitlines()
    assert f'pip install "jax[cuda12]=={jax.__version__}"' in line


def test_two_programs_are_compared(tmp_path):
    found = roofline.figures(hlo.kernels(TEXT), H100, devices=2, top=9)
    found |= {"peak_bytes": 4e9}
    file = tmp_path / "before.json"
    file.write_text(json.dumps({**found, "bytes": found["bytes"] / 2}) + "\n")
    before = program.read_program(file)
    assert program.ratios(found, before) == {
        "kernels": 1,
        "seconds": 1,
        "bytes": 2,
        "flops": 1,
        "peak_bytes": 1,
    }
    table = roofline.table(found, before)
    assert "peak 4.00 GB -> 4.00 GB" in table and "(gradient)" in table
    file.write_text("nothing\n")
    with pytest.raises(ValueError, match="--against=.*its last line"):
        program.read_program(file)


@pytest.mark.full
@pytest.mark.skipif(not PLUGIN, reason="needs the package jax[cuda12]")
def test_the_step_of_an_absent_gpu(monkeypatch, capsys):
    small = "--backbone=resnet18 --crop=161 --batch_size=4 --mpmc=off"
    bench.main(f"--what=compile --topology=h100:2 {small} --dtype=bfloat16".split())
    found = json.loads(capsys.readouterr().out)
    assert found["chip"] == "NVIDIA H100 80GB HBM3" and found["images_a_chip"] == 2
    assert found["kinds"]["convolutions"]["kernels"] > 60
    assert found["collectives"]["all-reduce"]["bytes"] > 4 * 11e6
    # Layer4's map has 11 positions: no gradient of a dilated kernel is as wide.
    assert found["widest_window"] == 7
    assert found["peak_bytes"] > found["temporary_bytes"] > 1e6


_CHAIN = """
import torch
from launch.bench.pytorch.count import count_step

kernel = torch.zeros(100, 100, device="meta", requires_grad=True)

def step():
    x = torch.zeros(100, 100, device="meta")
    for _ in range(5):
        x = torch.sin(x @ kernel)
    x.sum().backward()
    kernel.grad = None

print(count_step(step)[1] // 40_000)
"""


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_pytorchs_peak_is_what_autograd_keeps():
    """A kernel, its input, ten maps of a chain, and two gradients on the way back."""
    done = subprocess.run(
        [sys.executable, "-c", _CHAIN],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.split() == ["14"], done.stderr


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_pytorchs_step_is_counted_by_the_same_model():
    settings = ["--method=unimatch", "--mpmc=off", "--dtype=bfloat16"]
    args = bench._parser().parse_args(settings)

    def figures(batch_size):
        args.batch_size = batch_size
        config = bench.configuration(args, "unimatch")
        config.data.crop = 65
        kernels, peak = bench.count_peer(config)
        return {**roofline.figures(kernels, H100, 1, top=3), "peak": peak}

    small, large = figures(2), figures(4)
    assert small["peak"] < large["peak"] < 2 * small["peak"]
    assert large["kernels"] == small["kernels"] > 1000
    assert large["kinds"]["convolutions"]["flops"] == pytest.approx(
        2 * small["kinds"]["convolutions"]["flops"]
    )
    assert small["bytes"] < large["bytes"] < 2 * small["bytes"]


FEW = {name: bench.presets.METHODS[name] for name in ("supervised", "unimatch")}


def _check(capsys, *arguments):
    bench.main(["--what=gpu", "--steps=1", f"--backbone={tiny.BACKBONE}", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"]["versions"]["jax"] and found["total_seconds"] > 0
    return found


def test_without_a_gpu_one_line_says_what_to_do():
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--what=gpu"])
    (line,) = str(stopped.value.code).splitlines()
    assert line.startswith("error: --what=gpu: JAX finds no GPU") and "--shrink" in line


class _Step:
    """A step that fails at batches of four images, and has no finite loss in bf16."""

    figures = {"compile_seconds": 1.0}
    text = TEXT

    def __init__(self, config):
        if config.train.batch_size == 4:
            raise RuntimeError("out of memory\nand more")
        self._loss = 2.0 if config.model.dtype == "float32" else float("nan")

    def step(self):
        return self._loss

    def seconds(self):
        return 0.5

    def profile(self, folder):
        return [{"operation": "convolution"}]


def test_a_part_that_fails_stops_no_other(monkeypatch, capsys):
    monkeypatch.setattr(check, "TimedStep", _Step)
    monkeypatch.setattr(bench.presets, "METHODS", FEW)
    found = _check(capsys, "--shrink", "--dtype=float32", "--group_size=2")
    figures = found["timed"]["UniMatch, MPMC off"]
    assert figures["step_seconds"] == [0.5] * 3 and figures["loss"] == 2
    assert figures["modeled"] == {"unknown": "cpu"}
    assert found["small_steps"]["supervised in float32"]["losses"] == [2, 2]
    assert found["failed"] == {
        f"{name} in bfloat16": "ValueError: losses [nan, nan] are not finite"
        for name in FEW
    }
    found = _check(capsys, "--shrink", "--group_size=4")
    assert found["timed"] == {} and len(found["failed"]) == 2 + 2 * len(FEW)
    assert set(found["failed"].values()) == {"RuntimeError: out of memory"}


def test_the_model_is_that_of_the_device(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    found = check.modeled(TEXT)
    assert found["kernels"] == len(KERNELS) + 2 and found["seconds"] > 0


@pytest.mark.full
def test_the_check_of_a_gpu_rehearsed(monkeypatch, capsys):
    monkeypatch.setattr(bench.presets, "METHODS", FEW)
    monkeypatch.setattr(check, "LIMIT", math.inf)  # this machine may be busy
    found = _check(capsys, "--shrink", "--peer=torch")
    with_torch = {
        "UniMatch, MPMC off, beside PyTorch",
        "UniMatch, MPMC recommended, beside PyTorch",
    }
    assert set(found["failed"]) == with_torch  # which knows larger networks only
    for figures in (
        found["timed"][name] for name in found["timed"].keys() - with_torch
    ):
        assert figures["peak_bytes"] > 1e5 and figures["step_seconds"][1] > 0
        assert len(figures["operations"]) == 10
    for name in FEW:
        for dtype in ("float32", "bfloat16"):
            assert len(found["small_steps"][f"{name} in {dtype}"]["losses"]) == 2
