"""convert_weights on published networks, and runs that begin with weights."""

import functools
import logging
import pathlib

import chex
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from launch import convert_weights, evaluate
from mpmc_jax.experiments import pretrained
from mpmc_jax.models import ModelConfig, load_torch_state_dict
from mpmc_jax.models.weights import convert
from mpmc_jax.models.weights import files as weight_files
from mpmc_jax.models.weights.files import checksum
from mpmc_jax.models.weights.torch_names import torch_state_dict
from mpmc_jax.training.state import PLUGIN, begin_with, to_host
from tests.support import golden, tiny
from tests.support.data_sets import prepare_synthetic
from tests.support.variables import random_variables


def run_convert(*arguments):
    convert_weights.main([f"--{name}={value}" for name, value in arguments])


@pytest.mark.full
@pytest.mark.parametrize("path", golden.collected("*.json"))
def test_golden_recipes_come_back_bit_for_bit(path, tmp_path, capsys):
    published = golden.recipe_state_dict(path)
    given, ours, back = (tmp_path / f"{x}.safetensors" for x in ("in", "ours", "back"))
    prefixed = {f"module.{key}": value for key, value in published.items()}
    safetensors_numpy.save_file(prefixed, given)
    run_convert(("input", given), ("output", ours))
    printed = capsys.readouterr().out
    assert checksum(given) in printed and checksum(ours) in printed
    found = convert.load(ours)
    assert found.model == golden.model_of(path)
    chex.assert_trees_all_equal(
        found.variables, load_torch_state_dict(published, found.model)
    )
    run_convert(("input", ours), ("output", back), ("layout", "torch"))
    returned = safetensors_numpy.load_file(back)
    kept = {k: v for k, v in published.items() if "num_batches_tracked" not in k}
    assert returned.keys() == kept.keys()
    for key, value in kept.items():
        np.testing.assert_array_equal(returned[key], value)
        assert returned[key].dtype == value.dtype


def test_the_encoder_alone_goes_out_in_both_layouts(tmp_path, capsys):
    model = ModelConfig(backbone="resnet18", width=4, variant="augseg")
    variables = random_variables(model)
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    convert.save(whole, convert.Weights(model, True, variables, {"file": "x"}))
    run_convert(("input", whole), ("output", part), ("part", "encoder"))
    assert "the encoder of" in capsys.readouterr().out
    found = convert.load(part)
    assert not found.whole and found.model.backbone == "resnet18"
    chex.assert_trees_all_equal(
        found.variables["params"]["backbone"], variables["params"]["backbone"]
    )
    flat = tmp_path / "flat.safetensors"
    run_convert(
        ("input", whole), ("output", flat), ("part", "encoder"), ("layout", "torch")
    )
    keys = safetensors_numpy.load_file(flat).keys()
    assert {"conv1.weight", "layer4.1.bn2.running_var"} <= keys
    chex.assert_trees_all_equal(convert.load(flat).variables, found.variables)


def test_a_conversion_gives_equal_bytes_every_time(tmp_path):
    """The library's order of metadata differs from call to call."""
    model = ModelConfig(backbone="resnet18", width=4)
    given = tmp_path / "given.safetensors"
    arrays = torch_state_dict(random_variables(model), model)
    safetensors_numpy.save_file(arrays, given, {name: name for name in "abcdefg"})
    outputs = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for output in outputs:
        run_convert(("input", given), ("output", output))
    first, *others = (output.read_bytes() for output in outputs)
    assert others == [first] * 2
    assert convert.load(outputs[0]).model.backbone == "resnet18"
    # The library as well reads what was put in order.
    found = safetensors_numpy.load_file(outputs[0])
    ours = weight_files.read(outputs[0]).arrays
    chex.assert_trees_all_equal(found, ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "w.npz"}, "name a .safetensors file"),
        ({"input": "gone.pth"}, "gone.pth: no such file"),
        ({"input": "."}, "holds no run"),
        ({"input": ".", "state": "teacher"}, "--state=teacher is for a .pth"),
        (
            {"input": "text.npz"},
            "text.npz: is text, .* not weights: 'no weights'; down",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("no weights")
    given = {"input": "text.npz", "output": "w.safetensors"} | arguments
    with pytest.raises(SystemExit, match=message):
        run_convert(*given.items())
    assert not pathlib.Path("w.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir=DIR, or --weights=FILE"),
        (["--workdir=a", "--weights=b"], "give --workdir=DIR, or --weights=FILE"),
        (["--weights=WHOLE"], "--weights needs --dataset=NAME"),
        (["--weights=PART", "--dataset=synthetic"], "holds an encoder"),
        (
            ["--weights=WHOLE", "--dataset=synthetic", "--data_dir=MISSING"],
            "launch.prepare_data",
        ),
        (
            ["--weights=WHOLE", "--dataset=synthetic", "--data_dir=DATA"],
            "for 4 classes",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, message, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    files = _files(folder)
    data = folder / "synthetic_data"
    if "--data_dir=DATA" in arguments and not data.exists():
        prepare_synthetic(data, train=3, val=1)
    text = " ".join(arguments).replace("WHOLE", str(files["unimatch", "whole"]))
    text = text.replace("PART", str(files["unimatch", "encoder"]))
    text = text.replace("DATA", str(data)).replace("MISSING", str(folder / "missing"))
    with pytest.raises(SystemExit, match=message):
        evaluate.main(text.split())


@functools.cache
def _files(folder):
    """An encoder and a whole network for tiny runs, of two variants."""
    found = {}
    for variant in ("unimatch", "augseg"):
        model = ModelConfig(
            backbone="tiny", width=8, num_classes=tiny.CLASSES, variant=variant
        )
        whole = convert.Weights(model, True, random_variables(model, 5), {"file": "x"})
        for name, part in (("whole", whole), ("encoder", whole.encoder())):
            found[variant, name] = folder / f"{variant}_{name}.safetensors"
            convert.save(found[variant, name], part)
    return found


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("unimatch", "encoder"),
        ("mean_teacher", "whole"),
        pytest.param("mean_teacher", "encoder", marks=pytest.mark.full),
        pytest.param("unimatch", "whole", marks=pytest.mark.full),
        pytest.param("augseg", "encoder", marks=pytest.mark.full),
        pytest.param("augseg", "whole", marks=pytest.mark.full),
        ("cps", "whole"),
    ],
)
def test_students_and_teachers_begin_with_the_weights(
    method, part, tmp_path_factory, caplog
):
    variant = "augseg" if method == "augseg" else "unimatch"
    path = _files(tmp_path_factory.getbasetemp())[variant, part]
    config = tiny.config(f"method={method},mpmc=paper")
    config.model.pretrained = str(path)
    setup = tiny.setup(config)
    with caplog.at_level(logging.INFO, "mpmc_jax"):
        networks = setup.step.method.networks
        variables, origin = pretrained.initial_weights(
            config, setup.model, len(networks)
        )
    assert str(path) in caplog.text and origin["sha256"] == checksum(path)
    assert origin["adapted"] is False
    fresh = to_host(tiny.init_state(setup, 0))
    state = begin_with(fresh, variables)
    given = convert.load(path).variables
    # Two networks with one decoder would stay equal.
    whole = part == "whole" and len(networks) == 1
    assert ("must differ" in caplog.text) == (method == "cps")
    halves = ("backbone", "decoder") if whole else ("backbone",)
    for collection, tree in (
        ("params", state.params),
        ("batch_stats", state.batch_stats),
        ("params", state.ema_params),
        ("batch_stats", state.ema_batch_stats),
    ):
        if tree is None:
            assert method in ("unimatch", "cps")
            continue
        for network in networks:
            for half in halves:
                chex.assert_trees_all_equal(
                    tree[network][half], given[collection][half]
                )
    chex.assert_trees_all_equal(state.params[PLUGIN], fresh.params[PLUGIN])
    for network in () if whole else networks:
        decoder = state.params[network]["decoder"]
        chex.assert_trees_all_equal(decoder, fresh.params[network]["decoder"])
    if method == "cps":
        decoders = [state.params[network]["decoder"] for network in networks]
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(*decoders)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        state,
        fresh,
    )


@pytest.mark.parametrize(("name", "warns"), [("voc", True), ("synthetic", False)])
def test_random_weights_are_warned_about_where_published_ones_are_not(
    name, warns, caplog
):
    config = tiny.config()
    config.data.name = name
    assert pretrained.initial_weights(config, tiny.setup(config).model) == ({}, {})
    assert ("model.pretrained" in caplog.text) == warns
