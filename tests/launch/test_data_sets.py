"""Every data set from its published layout to its own protocol's figures."""

import contextlib
import json
import logging

import h5py
import jax
import numpy as np
import pytest

from configs import acdc, base, cityscapes, folder, presets, voc
from launch import check_data, convert_weights, evaluate, prepare_data
from mpmc_jax.data.build import build_eval
from mpmc_jax.evaluation.volumes import FIGURES, score_volume
from mpmc_jax.experiments.train import prepare as prepare_run
from mpmc_jax.experiments.train import train
from mpmc_jax.models import ModelConfig
from mpmc_jax.models.weights import convert
from tests.evaluation.test_volumes import NAMES, evaluate_bands, predicted
from tests.support import tiny, trees
from tests.support.data_sets import make_folder, real
from tests.support.variables import random_variables

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def _settings_stay():
    """A run sets the precision of its process."""
    with contextlib.ExitStack() as stack:
        before = jax.config.values["jax_default_matmul_precision"]
        stack.callback(jax.config.update, "jax_default_matmul_precision", before)
        yield


def prepare(name, source, data_dir, *more):
    named = [f"--dataset={name}", f"--source={source}", *more]
    check_data.main(named)
    prepare_data.main([*named, f"--data_dir={data_dir}"])
    check_data.main([f"--dataset={name}", f"--data_dir={data_dir}"])


def two_steps(config, data_dir, workdir, crop):
    tiny.shrink(config)
    if config.model.name == "unet":
        config.model.width = 16
    config.data.crop = crop
    config.data.data_dir = str(data_dir)
    config.train.batch_size = config.train.group_size = 2
    config.train.devices = 1
    config.train.steps = config.train.eval_every = 2
    config.data.allow_absent_classes = True
    state = train(config, workdir)
    assert int(state.step) == 2
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = {}
    for line in lines:
        found |= json.loads(line)
    assert np.isfinite(found["train/loss"])
    return found


def scored(workdir, *arguments):
    evaluate.main([f"--workdir={workdir}", "--checkpoint=last", *arguments])
    newest = max(workdir.glob("eval_val_last*.json"), key=lambda x: x.stat().st_mtime)
    return json.loads(newest.read_text())


def test_voc_with_the_masks_of_sbd(tmp_path, capsys):
    labels = trees.make_voc(tmp_path / "source")
    trees.add_sbd(tmp_path / "source")
    prepare("voc", tmp_path / "source", tmp_path / "data")
    assert "PARTIAL" in capsys.readouterr().out
    config = voc.get_config("method=unimatch,mpmc=recommended,split=3")
    run = tmp_path / "run"
    found = two_steps(config, tmp_path / "data", run, tiny.CROP)
    assert found["val/pad_to"] == 256
    written = scored(run)
    assert (written["protocol"], written["pad_to"]) == ("whole", 0)
    assert written["partial"] is True and written["checkpoint"] == "last"
    # Exact at every pixel that is not void.
    pixels = sum((labels[key] != 255).sum() for key in trees.VOC_VAL)
    assert np.sum(written["confusion"]) == pixels
    truth = np.concatenate([labels[key].ravel() for key in trees.VOC_VAL])
    np.testing.assert_array_equal(
        np.sum(written["confusion"], 1), np.bincount(truth[truth != 255], minlength=21)
    )
    center = scored(run, "--protocol=center_crop")
    assert (center["protocol"], center["window"]) == ("center_crop", tiny.CROP)
    several = scored(run, "--scales=0.5,1", "--flip")
    assert several["scales"] == [0.5, 1.0] and several["flip"] is True
    out = capsys.readouterr().out
    assert "partial data set" in out and "(last)" in out
    # The network alone, out of a file, is as good as the run.
    file = tmp_path / "weights" / "voc.safetensors"
    out = [f"--output={file}", "--checkpoint=last"]
    convert_weights.main([f"--input={run}", *out])
    there = ["--dataset=voc", f"--data_dir={tmp_path / 'data'}"]
    evaluate.main([f"--weights={file}", *there])
    (path,) = file.parent.glob("eval_val_voc_on_voc_*.json")
    again = json.loads(path.read_text())
    assert again["confusion"] == written["confusion"]
    assert again["partial"] is True and again["run"]["pretrained"]["file"] == file.name


@pytest.mark.parametrize(
    ("method", "during", "after"),
    [
        ("unimatch", "slide_unimatch", ()),
        ("u2pl", "center_crop", ("slide_u2pl", "slide_ael")),
    ],
)
def test_cityscapes_in_windows(method, during, after, tmp_path, capsys):
    labels = trees.make_cityscapes(tmp_path / "source")
    prepare("cityscapes", tmp_path / "source", tmp_path / "data")
    config = cityscapes.get_config(f"method={method},mpmc=paper,split=1")
    assert config.eval.protocol == during
    # One epoch of warm-up would be all of it; and there are few images.
    config.u2pl.warmup_epochs = 0
    run = tmp_path / "run"
    two_steps(config, tmp_path / "data", run, 257)
    (truth,) = (labels[key] for key in labels if "frankfurt" in key)
    written = scored(run)
    assert written["protocol"] == during and during in capsys.readouterr().out
    size = (257, 257) if during == "center_crop" else trees.CITY_SHAPE
    counted = np.prod(size)
    if during != "center_crop":
        counted = (truth != 255).sum()
        np.testing.assert_array_equal(
            np.sum(written["confusion"], 1),
            np.bincount(truth[truth != 255], minlength=19),
        )
    assert 0 < np.sum(written["confusion"]) <= counted
    for name in after:
        written = scored(run, f"--protocol={name}")
        assert written["protocol"] == name
        assert np.sum(written["confusion"]) == (truth != 255).sum()
        assert name in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["h5", "nifti"])
def test_acdc_by_volume(layout, tmp_path, capsys):
    make = {"h5": trees.make_acdc_h5, "nifti": trees.make_acdc_nifti}[layout]
    make(tmp_path / "source")
    prepare("acdc", tmp_path / "source", tmp_path / "data")
    lists = tmp_path / "source" / "splits"
    config = acdc.get_config(f"method=unimatch,mpmc=paper,split=1,lists={lists}")
    run = tmp_path / "run"
    found = two_steps(config, tmp_path / "data", run, 32)
    assert 0 <= found["val/dice"] <= 1
    written = scored(run)
    assert written["protocol"] == "volume" and written["window"] == 32
    values = np.array(written["volumes"], float)
    assert values.shape == (len(trees.ACDC_VAL), 3, len(FIGURES))
    assert written["scalars"]["dice"] == pytest.approx(found["val/dice"], abs=1e-6)
    assert np.isfinite(values[..., 0]).all()
    assert "HD95" in capsys.readouterr().out


def test_deeplab_reads_acdc_with_a_stem_from_rgb_weights(tmp_path, capsys, caplog):
    """The text's alternative: one channel, from weights of three.

    See row D12 of docs/deviations.md.
    """
    trees.make_acdc_h5(tmp_path / "source")
    prepare("acdc", tmp_path / "source", tmp_path / "data")
    model = ModelConfig(backbone="tiny", width=8)
    rgb = convert.Weights(model, True, random_variables(model), {"file": "rgb"})
    convert.save(tmp_path / "rgb.safetensors", rgb)
    convert_weights.main(
        [
            f"--input={tmp_path / 'rgb.safetensors'}",
            f"--output={tmp_path / 'encoder.safetensors'}",
            "--part=encoder",
        ]
    )
    lists = tmp_path / "source" / "splits"
    config = acdc.get_config(f"model=deeplabv3plus,crop=224,split=1,lists={lists}")
    assert config.data.crop == 224
    config.model.pretrained = str(tmp_path / "encoder.safetensors")
    config.optimizer.lr = 0.0
    with caplog.at_level(logging.INFO, "mpmc_jax"):
        two_steps(config, tmp_path / "data", tmp_path / "run", tiny.CROP)
    assert "adapted from 3 channels to 1" in caplog.text
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["pretrained"]["adapted"] is True
    convert_weights.main(
        [
            f"--input={tmp_path / 'run'}",
            f"--output={tmp_path / 'out.safetensors'}",
            "--checkpoint=last",
        ]
    )
    out = convert.load(tmp_path / "out.safetensors").variables["params"]["backbone"]
    given = rgb.variables["params"]["backbone"]["stem0"]["conv"]["kernel"]
    np.testing.assert_array_equal(
        out["stem0"]["conv"]["kernel"], given.sum(2, keepdims=True)
    )
    np.testing.assert_array_equal(
        out["layer4_0"]["conv1"]["conv"]["kernel"],
        rgb.variables["params"]["backbone"]["layer4_0"]["conv1"]["conv"]["kernel"],
    )


def test_a_folder_of_gray_images(tmp_path, capsys):
    source = make_folder(tmp_path / "source", gray=True)
    prepare("folder", source, tmp_path / "data")
    config = folder.get_config("method=mean_teacher,mpmc=recommended,split=4")
    two_steps(config, tmp_path / "data", tmp_path / "run", tiny.CROP)
    assert scored(tmp_path / "run")["num_images"] > 0


def test_the_sample_of_real_voc(tmp_path, capsys):
    prepare("voc", real("voc_sample"), tmp_path / "data")
    few, full = (
        voc.get_config(f"method=augseg,mpmc=paper,split={split}")
        for split in ("10", "full")
    )
    few.data.data_dir, few.data.allow_absent_classes = str(tmp_path / "data"), True
    _, pipeline, _ = prepare_run(few)
    assert (pipeline.num_labeled, pipeline.num_unlabeled) == (10, 110)
    two_steps(full, tmp_path / "data", tmp_path / "run", tiny.CROP)
    written = scored(tmp_path / "run")
    assert (written["num_images"], written["pad_to"]) == (40, 0)
    assert np.sum(written["confusion"]) > 40 * 50_000


def test_real_acdc_by_volume_equals_numpy(tmp_path, capsys):
    """The Dice of a prediction that is known, on all 20 volumes."""
    root = real("acdc")
    prepare("acdc", root, tmp_path)
    config = base.get_base()
    config.data.name, config.data.data_dir = "acdc", str(tmp_path)
    source = build_eval(presets.apply(config, ""), "val")
    result = evaluate_bands(source, 256)
    assert result.volumes is not None and result.volumes.values.shape == (20, 3, 3)
    lines = (root / "splits" / "val.txt").read_text().split()
    assert list(dict.fromkeys(source.volumes)) == [
        line.rpartition("/")[2].removesuffix(".h5") for line in lines
    ]
    by_hand = []
    for values, line in zip(result.volumes.values, lines, strict=True):
        with h5py.File(root / line) as file:
            truth = np.asarray(file["label"])
        guess = np.stack([predicted(label.shape, 256) for label in truth])
        dice = [
            2
            * ((guess == c) & (truth == c)).sum()
            / ((guess == c).sum() + (truth == c).sum())
            for c in (1, 2, 3)
        ]
        np.testing.assert_allclose(values[:, 0], dice, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(values, score_volume(guess, truth, 4))
        by_hand.append(dice)
    figures = result.scalars(NAMES)
    assert figures["dice"] == pytest.approx(np.mean(by_hand), abs=1e-12)
