"""What training says before it trains."""

import logging
import re
import types

import jax
import numpy as np
import pytest

from configs import acdc, folder, voc
from mpmc_jax.data.build import build_eval
from mpmc_jax.data.splits import Split
from mpmc_jax.experiments import config_checks, train
from mpmc_jax.experiments.build import build_parallel, init_state
from mpmc_jax.experiments.identity import RunIdentity, data_facts
from mpmc_jax.training import loop
from tests.support import tiny
from tests.support.data_sets import prepare_synthetic
from tests.support.programs import run


def _log_summary(caplog, labeled, unlabeled, method="unimatch", unused=0):
    pipeline = types.SimpleNamespace(
        split=Split(labeled, unlabeled),
        num_labeled=len(labeled),
        num_unlabeled=len(unlabeled),
        repetition=1.0,
        steps_per_epoch=1,
        unused=unused,
        warnings=("2 images in two splits",),
    )
    rhythm = loop.LoopConfig(steps=7, log_every=1, eval_every=1, checkpoint_every=1)
    config = tiny.config(f"method={method}", train__batch_size=4, u2pl__warmup_epochs=7)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        parallel = types.SimpleNamespace(devices=["cpu"])
        train.log_summary(config, tiny.setup(config), pipeline, rhythm, parallel)
    return caplog.text


def test_images_in_both_lists_and_batches_larger_than_a_list_are_told(caplog):
    letters = tuple("abcde")
    both = _log_summary(caplog, letters[:2], letters)
    assert "2 labeled images" in both
    assert (
        "5 unlabeled with the labeled ones among them; 1 step per epoch, 7 in" in both
    )
    assert "7 in all; 1 device" in both
    assert "2 images in two splits" in both
    assert "come twice" not in both
    few = _log_summary(caplog, letters[:2], letters[2:])
    assert "3 unlabeled; 1 step per epoch, 7 in all; 1 device" in few
    assert "takes 4 unlabeled images per step, but there are 3" in few
    # One a group: two of three.
    assert "come twice" not in _log_summary(caplog, letters[:2], letters[2:], "ael")


def test_unused_labels_and_a_run_that_is_all_warmup_are_told(caplog):
    lists = tuple("abcdefgh"), tuple("ijklmnop")
    plain = _log_summary(caplog, *lists)
    assert "not used" not in plain and "warm-up" not in plain
    assert "3 labeled images not used" in _log_summary(caplog, *lists, unused=3)
    warm = _log_summary(caplog, *lists, "u2pl")
    assert "lasts the whole run of 7 steps (1 per epoch)" in warm


@pytest.mark.parametrize("crop", [33, 2001])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_step_that_is_large_for_a_cpu_is_told_once(caplog, platform, crop):
    config = tiny.config("method=unimatch", train__batch_size=4)
    setup = tiny.setup(config)
    config.data.crop = crop
    device = types.SimpleNamespace(platform=platform)
    parallel = types.SimpleNamespace(devices=[device, device])
    train.log_large_on_cpu(config, setup, parallel)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (platform == "cpu" and crop > 33)
    assert all("8 crops of 2001 pixels" in line for line in said)
    assert all("--config.train.batch_size=2" in line for line in said)


@pytest.mark.parametrize(
    ("module", "argument", "appended"),
    [
        (acdc, "", "crop=96"),
        (acdc, "method=unimatch,mpmc=recommended", "crop=96"),
        (acdc, "method=u2pl,mpmc=paper", "crop=96"),
        (folder, "method=unimatch", "backbone=resnet18,crop=97"),
        (voc, "method=cps,mpmc=paper", "backbone=resnet18,crop=97"),
        (voc, "method=u2pl", "backbone=resnet18,crop=97"),
        (
            voc,
            "method=unimatch_v2,mpmc=recommended",
            "model=deeplabv3plus,backbone=resnet18,crop=84",
        ),
        (
            folder,
            "model=segmenter,backbone=vit_s16",
            "model=deeplabv3plus,backbone=resnet18,crop=96",
        ),
    ],
)
def test_the_advice_for_a_cpu_is_accepted(caplog, module, argument, appended):
    config = module.get_config(argument)
    if "unimatch_v2" in argument:
        config.model.pretrained = "dinov2_b14"
    device = types.SimpleNamespace(platform="cpu")
    parallel = types.SimpleNamespace(devices=[device])
    train.log_large_on_cpu(config, tiny.setup(config), parallel)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"append :{appended} to --config" in said
    small = module.get_config(f"{argument},{appended}")
    for name, value in re.findall(r"--config\.(\S+)=([^\s,]*)", said):
        section, key = name.split(".")
        small[section][key] = type(small[section][key])(value)
    assert small.train.precise_bn == 10 and small.optimizer.lr == 0.02
    assert small.optimizer.head_multiplier == 1 and small.train.steps == 200
    assert small.model.pretrained == ""
    config_checks.check_ranges(small)
    config_checks.check_read(small)
    small.train.devices = 1
    build_parallel(small)
    caplog.clear()
    train.log_large_on_cpu(small, tiny.setup(small), parallel)
    assert not caplog.records


def test_a_crop_that_no_image_fills_is_told(tmp_path, caplog):
    prepare_synthetic(tmp_path)
    config = tiny.config("method=supervised", data__split="4")
    config.data.data_dir, config.data.scale_max = str(tmp_path), 2.0
    dataset = build_eval(config, "val")
    largest = max(max(dataset.size(i)) for i in range(len(dataset)))
    config.data.crop = 2 * largest
    train.log_large_crop(config)
    assert not caplog.records
    config.data.crop += 1
    train.log_large_crop(config)
    (record,) = caplog.records
    assert f"images of up to {largest} pixels a side" in record.getMessage()


def test_statistics_are_counted_from_the_runs_own_images(tmp_path):
    prepare_synthetic(tmp_path)
    # AEL would have to ask for its partners.
    config = tiny.config("method=ael", data__split="4", data__threads=0)
    config.data.data_dir, config.train.precise_bn = str(tmp_path), 2
    _, pipeline, setup = train.prepare(config)
    parallel = build_parallel(config)
    place = train.make_place(pipeline, parallel)
    recompute_bn_stats = train.make_bn_recompute(
        config, setup, pipeline, parallel, place
    )
    state = jax.tree.map(np.asarray, init_state(setup, 0))
    once = parallel.fetch(recompute_bn_stats(parallel.replicate(state)))
    twice = parallel.fetch(recompute_bn_stats(parallel.replicate(once)))
    assert tiny.difference(twice, once) == 0
    # AEL is evaluated by its teacher.
    assert tiny.difference(once.ema_batch_stats, state.ema_batch_stats) > 1e-3
    assert tiny.difference(once.batch_stats, state.batch_stats) == 0
    config.train.precise_bn = 0
    assert train.make_bn_recompute(config, setup, pipeline, parallel, place) is None


def test_class_weights_are_counted_once_and_recorded(tmp_path):
    prepare_synthetic(tmp_path)
    config = tiny.config("method=supervised", data__split="4", data__threads=0)
    config.data.data_dir = str(tmp_path)
    facts, pipeline, setup = train.prepare(config)
    assert setup.step.supervised_loss.class_weights == ()
    assert "class_weights" not in data_facts(facts, pipeline)["data"]
    config.imbalance.class_weights = ("frequencies",)
    config.method.supervised_loss = "focal_lovasz"
    facts, pipeline, setup = train.prepare(config)
    weights = setup.step.supervised_loss.class_weights
    assert len(weights) == facts.num_classes
    described = data_facts(facts, pipeline, weights)
    assert (
        RunIdentity(config, described, {}).manifest()["data"]["class_weights"]
        == weights
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=w"], "error: --config is needed; --help says more"),
        (["--config=configs/camvid.py"], "error: --workdir is needed; --help"),
        (["--fit"], "error: --config is needed; --help says more"),
        (
            ["--config=configs/camvit.py:method=cps", "--workdir=w"],
            "; did you mean 'configs/camvid.py'? there are ['configs/acdc.py'",
        ),
        pytest.param(
            ["--config=configs/camvid.py", "--workdir=w", "x"],
            "arguments ['x']",
            marks=pytest.mark.full,
        ),
        pytest.param(["--confg=x"], "Did you mean: config", marks=pytest.mark.full),
        pytest.param(
            ["--config=configs/base.py", "--workdir=w"],
            "error: --config names a file without get_config; there are ['configs/ac",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["--config=configs/camvid.py", "--workdir=w", "--config.data.flip=maybe"],
            "data.flip=maybe: True or False is needed, not 'maybe'",
            marks=pytest.mark.full,
        ),
        (
            ["--config=configs/synthetic.py", "--workdir=w", "--config.train.epochs=5"],
            "epochs does not act, because train.steps=150 replaces it; leave it out",
        ),
    ],
)
def test_a_command_line_that_lacks_something_ends_in_one_line(arguments, message):
    output = run("launch.train", *arguments, fails=True)
    assert message in output
    assert len(output.splitlines()) == 1


def test_help_is_no_failure():
    output = run("launch.train", "--help")
    assert "--workdir" in output and "--config" in output
