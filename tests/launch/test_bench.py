"""The bench: figures that must be right, and one JSON object a line."""

import argparse
import functools
import importlib.util
import json
import os
import re
import time

import jax
import numpy as np
import pytest
from PIL import Image

from launch.bench import (
    __main__ as bench,
)
from launch.bench import (
    compile as bench_compile,
)
from launch.bench import (
    data as bench_data,
)
from launch.bench import (
    scaling as bench_scaling,
)
from launch.bench import (
    timing,
    topologies,
)
from launch.bench.pytorch import run as bench_peer
from mpmc_jax.data.geometry.cropping import CropConfig
from tests.support import tiny
from tests.support.data_sets import prepare_synthetic
from tests.support.programs import ENVIRONMENT, run

NETWORK = (f"--backbone={tiny.BACKBONE}", "--crop=49")
SMALL = (*NETWORK, "--steps=1")
SUPERVISED = ("--method=supervised", "--mpmc=off")


def _bench(*arguments, **environment):
    program = ("tests.support.small_program", "launch.bench")
    output = run(*program, *arguments, **environment)
    figures = json.loads(output.splitlines()[-1])
    assert figures["manifest"]["versions"]["jax"]
    return figures


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 19.02G of 15.75G hbm. Exceeded hbm capacity by 3G.",
            "Used 19.02G of 15.75G hbm",
        ),
        (
            "RESOURCE_EXHAUSTED: out of memory\nand more",
            "RESOURCE_EXHAUSTED: out of memory",
        ),
    ],
)
def test_what_a_refused_program_needs(text, said):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    assert bench_compile._compile(Refused()) == (None, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--images=3",
            "--images is not for --what=step; it is for data, data --images",
        ),
        (
            "--peer=torch --profile=x",
            "--profile is not for --what=step --peer; .* step$",
        ),
        ("--what=methods --method=ael", "--method is not for --what=methods; "),
        ("--what=mpmc --data_dir=x", "it is for data --images=0, eval --images=0$"),
        (
            "--what=scaling --topology=v5e:4x4",
            "it is for compile, compile --topology, ",
        ),
        ("--what=fits --batch_size=2", "--batch_size is not for --what=fits; "),
        ("--what=compile --steps=5", "--steps is not for --what=compile; "),
        (
            "--what=compile --topology=v5e:2x2 --devices=4",
            "not for --what=compile --topology",
        ),
        ("--what=data --backbone=resnet18", "--backbone is not for --what=data; "),
        ("--what=data --images=0 --largest=500", "it is for data, eval$"),
        ("--what=eval --remat=all", "--remat is not for --what=eval; "),
        ("--what=eval --images=0 --sizes=40", "it is for eval$"),
        ("--what=eval --images=0 --crop=49", "synthetic is evaluated whole$"),
    ],
)
def test_an_argument_that_does_not_act_is_refused(arguments, said):
    """Also one that is given as its default."""
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments.split())
    (line,) = str(stopped.value.code).splitlines()
    assert line.startswith("error: --") and re.search(said, line), line


def test_each_argument_acts_on_something_that_is_measured():
    args = bench._parser().parse_args([])
    assert {"what"}.union(*bench.ARGUMENTS.values()) == vars(args).keys()
    for program in topologies.METHODS:
        settings = program.settings()
        asked = argparse.Namespace(**{**vars(args), **settings})
        bench.check_arguments(asked, settings.keys() - {"what"})


@pytest.mark.full
def test_step_and_its_trace(tmp_path):
    profile = f"--profile={tmp_path}"
    # Optimized: without, other operations than convolutions are the dearest.
    found = _bench("--what=step", *SMALL, *SUPERVISED, profile, XLA_FLAGS="")
    assert found["images_per_second"] > 0
    assert found["flops"] > 1e9 and found["peak_bytes"] > 1e6
    assert found["bytes_accessed"] > 1e6
    # The cache gives the program back; what compiles it twice as fast is not a cache.
    assert found["cached_compile_seconds"] < found["compile_seconds"] / 2
    assert 0 < found["share_of_matmul"] < 1
    operations = found["operations"]
    assert len(operations) == 10
    seconds = [each["seconds"] for each in operations]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    assert any("conv" in each["computes"] for each in operations)
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.full
def test_mpmcs_share():
    found = _bench("--what=mpmc", *SMALL, "--method=mean_teacher")
    assert 0 < found["share"] < 1 and 0 < found["head_share"] < 1
    assert found["head_rate_over_decoders"] > 0


@pytest.mark.full
def test_what_fits():
    found = _bench("--what=fits", *NETWORK, *SUPERVISED, "--steps=2")
    peaks = found["peak_bytes_by_images_a_device"]
    assert list(peaks) == ["2", "4"] and 1e6 < peaks["2"] < peaks["4"]
    assert found["largest_that_fits"] == 4 and found["device_bytes"] > peaks["4"]


@pytest.mark.full
def test_compiled_for_this_machine():
    compiled = ("--what=compile", *NETWORK, *SUPERVISED)
    found = _bench(*compiled)
    assert found["chips"] == 1 and found["images_a_chip"] == 2
    assert found["flops"] > 1e9 and found["peak_bytes"] > found["temporary_bytes"] > 1e6
    assert _bench(*compiled, "--remat=all")["flops"] > found["flops"]


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"
)
def test_compiled_for_absent_tpus(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setitem(ENVIRONMENT, "XLA_FLAGS", "")  # libtpu ends at those of CPUs
    small = ("--what=compile", "--topology=v5e:2x2", "--batch_size=8", "--crop=33")
    found = _bench(*small, *SUPERVISED, "--backbone=resnet18")
    assert found["chip"] == "TPU v5 lite" and found["chips"] == 4
    # A chip's share of what one chip would compute, and gradients that are summed.
    assert found["images_a_chip"] == 2
    assert found["collectives"]["all-reduce"]["bytes"] > 4 * 11e6


def test_a_topology_that_is_unknown(capsys):
    with pytest.raises(SystemExit, match="--topology=v5e:nonsense: .*libtpu"):
        bench.main(["--what=compile", "--topology=v5e:nonsense"])


def test_collectives_are_counted():
    program = """
  %a = f32[64,2]{1,0} all-reduce(%x), replica_groups={}
  %b = (bf16[8]{0}, bf16[8]{0}) all-reduce-start(%y, %z), channel_id=1
  %c = (f32[4]{0}, f32[16]{0}) all-gather-start(%w), dimensions={0}
  %d = f32[64]{0} add(%p, %q)
  %e = (pred[3]{0}, u32[]) all-reduce(%r, %s)
"""
    assert bench_compile.collectives(program) == {
        "all-reduce": {"count": 3, "bytes": 512 + 32 + 7},
        "all-gather": {"count": 1, "bytes": 64},
    }


@pytest.mark.full
@pytest.mark.parametrize(
    "what",
    ["eval --backbone=resnet18", "data --crop=49", "data --crop=49 --method=ael"],
)
def test_figures_of_a_prepared_data_set(what, tmp_path):
    prepare_synthetic(tmp_path, train=200, val=4)
    arguments = f"--what={what} --images=0 --steps=1".split()
    found = _bench(*arguments, f"--data_dir={tmp_path}")
    assert found["images_per_second"] > 0
    if what.startswith("data"):
        # The others are the split's 13 labeled ones.
        assert found["records"] == 187
        assert found["resident_bytes"] > 2**26


class _Growing:
    """A step whose time has a fixed cost, and grows by images and pixels."""

    def __init__(self, config):
        train = config.train
        self.figures = {"flops": train.batch_size / train.devices}
        self._seconds = 1 + train.batch_size * config.data.crop**2 / train.devices / 1e4

    def seconds(self):
        return self._seconds


def test_growth_with_batch_crop_and_devices(monkeypatch, capsys):
    monkeypatch.setattr(bench_scaling, "TimedStep", _Growing)
    scaling = ["--what=scaling", "--batch_size=4", "--crop=101"]
    bench.main(scaling)
    found = json.loads(capsys.readouterr().out)
    assert found["seconds_by_batch"].keys() == {"4", "8", "16"}
    assert found["seconds_by_crop"].keys() == {"101", "151", "201"}
    assert found["batches_off_the_line"] < 1e-9
    assert found["crops_off_the_line"] < 1e-9

    bench.main([*scaling, "--devices=4"])
    found = json.loads(capsys.readouterr().out)
    assert found["devices_flops_over_one"] == 1
    one, four = 1 + 4 * 1.0201, 1 + 1.0201
    assert found["one_device_seconds"] == pytest.approx(one)
    assert found["devices_over_one"] == pytest.approx([four / one] * 3)


def test_a_time_off_the_line_is_seen():
    sizes = [2, 4, 8]
    assert bench_scaling.off_the_line(sizes, np.array([3.0, 5.0, 9.0])) < 1e-9
    # The least squares are 43/28 x - 1/2: 18/7 for 3, 79/14 for 5, 165/14 for 12.
    off = bench_scaling.off_the_line(sizes, np.array([3.0, 5.0, 12.0]))
    assert off == pytest.approx(1 / 7)


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.parametrize("mpmc", ["off", "paper", "recommended"])
def test_pytorchs_step_computes_the_same_loss(mpmc):
    arguments = ("--what=step", "--peer=torch,torch_best", f"--mpmc={mpmc}")
    found = _bench(*arguments, "--backbone=resnet50", "--crop=65", "--steps=1")
    for kind in ("torch", "torch_best"):
        assert abs(found[f"{kind}_loss"] / found["loss"] - 1) < 1e-5
        assert found[f"over_{kind}"][1] > 0


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_pytorch_evaluates_to_the_same_pixels():
    images = ("--images=4", "--sizes=2", "--largest=70", "--steps=1")
    found = _bench("--what=eval", "--peer=torch", "--backbone=resnet50", *images)
    assert found["pixels_as_torch"] > 0.999
    assert found["rate_over_torch"][1] > 0


def test_a_peer_that_what_is_measured_does_not_have():
    with pytest.raises(SystemExit, match=r"torch_best.*of eval valid are \('torch',"):
        bench.main(["--what=eval", "--peer=torch_best"])


def test_a_peer_that_ends_is_said():
    with (
        bench_peer.Peer(functools.partial, os._exit, 3) as peer,
        pytest.raises(ValueError, match="ended with status 3"),
    ):
        peer.ask()


def test_a_peer_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install torch"):
        bench.main(["--what=step", "--peer=torch"])


def test_data_beside_a_plain_pipeline(capsys):
    bench.main(["--what=data", "--images=3", "--crop=65", "--steps=2"])
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"]["data"] == {"dataset": "made-up"}
    low, median, high = found["over_plain"]
    assert 1 < low <= median <= high
    stages = ("read", "decode", "geometry", "batching")
    assert all(found[f"{name}_seconds_a_sample"] >= 0 for name in stages)
    assert found["decode_seconds_a_sample"] > 0
    with pytest.raises(SystemExit, match="--largest=501"):
        bench.main(["--what=data", "--images=1", "--largest=501"])


def test_the_plain_pipeline_makes_normalized_views():
    (content,) = bench_data.made_up(1, 500)
    rng = np.random.default_rng(0)
    sample = bench_data.plain_sample(content, rng, CropConfig(65, 1.0, 1.0))
    for view in (sample.weak, *sample.strong):
        assert view.shape == (3, 65, 65) and view.dtype == np.float32
        assert -2.2 < view.min() < view.max() < 2.7
    assert not np.array_equal(sample.weak, sample.strong[0])


def test_hue_turns_by_the_shift():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    turned = np.asarray(bench_data.turn_hue(red, 85))
    np.testing.assert_array_equal(turned, np.full((2, 2, 3), (0, 255, 0)))


def test_a_ceiling_and_a_spread(monkeypatch):
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.5, 3.5, 5.5, 5.5, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert timing.matmul_ceiling("float32") == 2 * 2048**3 / 0.5
    assert timing.spread([3.0, 1.0, 2.0, 9.0]) == [1.0, 2.5, 9.0]
