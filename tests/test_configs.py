"""Every configuration builds and traces to a step; every method at least once."""

import importlib
import pathlib
import types

import numpy as np
import pytest

from configs import base, presets
from mpmc_jax.data import build as data_build
from mpmc_jax.data.splits import Split
from mpmc_jax.experiments import config_checks
from mpmc_jax.experiments.build import build_base, build_schedule
from mpmc_jax.methods.supervised import SupervisedOnly
from mpmc_jax.pixels import RGB
from mpmc_jax.training.parallel import Layout, Parallel
from tests.support import tiny

FILES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "presets")
)
VARIANTS = [
    "method=unimatch,mpmc=recommended",
    "method=mean_teacher,mpmc=paper",
    "method=supervised,mpmc=off",
    "method=augseg,mpmc=recommended",
    "method=u2pl,mpmc=recommended",
    "method=ael,mpmc=paper",
    "method=unimatch_v2,mpmc=recommended",
    "method=fixmatch,mpmc=paper",
    "method=cps,mpmc=recommended",
]


def pairs() -> list[tuple[str, str]]:
    """Each file and each variant at least once, not their product."""
    count = max(len(FILES), len(VARIANTS))
    return [(FILES[i % len(FILES)], VARIANTS[i % len(VARIANTS)]) for i in range(count)]


def test_the_variants_cover_every_method_and_mode():
    text = ",".join(VARIANTS)
    assert all(f"method={name}," in text for name in presets.METHODS)
    assert all(f"mpmc={name}" in text for name in presets.MPMC)


def _small(file, variant):
    module = importlib.import_module(f"configs.{file}")
    cfg = tiny.shrink(module.get_config(variant))
    if cfg.model.name == "unet":
        cfg.data.crop, cfg.model.width = 32, 16
    # There are fewer classes here than in the data sets that these are of.
    cfg.ael.unqueried = ()
    return cfg


@pytest.mark.full
@pytest.mark.parametrize(("file", "variant"), pairs())
def test_a_configuration_traces_to_a_step(file, variant):
    """Steps are taken in test_data_sets.py, by each method in test_smoke_matrix.py."""
    tiny.check_trace(_small(file, variant))


@pytest.mark.parametrize("method", ["unimatch", "cps", "ael"])
def test_every_supervised_loss_is_for_every_method(method):
    """The objective has them; a method only says what is supervised."""
    loss = {"method__supervised_loss": "focal_lovasz"}
    tiny.check_trace(tiny.config(f"method={method}", **loss))


@pytest.mark.full
def test_a_configuration_takes_two_steps():
    """CamVid's, whose pictures no other test trains on."""
    state, metrics = tiny.run(_small("camvid", "method=mean_teacher,mpmc=paper"), 2)
    assert int(state.step) == 2
    for step in metrics:
        assert not step.skipped
        assert np.isfinite(step.values["loss"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "method=mean_teachr",
            r"method='mean_teachr' is unknown; did you mean 'mean_teacher'\? valid: ",
        ),
        ("mpmc=on", r"mpmc='on' is unknown; valid: \['off', 'paper', 'recommended'\]"),
        ("metod=unimatch", "KEY one of"),
        ("unimatch", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_argument_lists_the_valid_ones(argument, message):
    with pytest.raises(ValueError, match=message):
        presets.apply(base.get_base(), argument)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__backbone", "resnet34", "resnet18"),
        ("model__name", "fcn", "deeplabv3plus"),
        ("model__variant", "other", "augseg"),
        ("model__dtype", "float16", "bfloat16"),
        ("method__name", "flexmatch", "mean_teacher"),
        ("method__supervised_loss", "tversky", "ohem"),
        ("method__supervised_loss", "ce_dice_ohem", "the mean of two"),
        ("mpmc__tap", "layer9", "layer1"),
        ("mpmc__head", "big", "lite"),
        ("mpmc__windows", (5,), "19"),
        ("mpmc__lambda_scale", "sum", "mean"),
        ("mpmc__teacher_head", "ema", "student"),
        ("train__parallel", "pjit", "shard_map"),
        ("train__group_size", 3, "multiple"),
        ("train__batch_size", 1, "the least that unimatch takes: --config.train.group"),
        ("train__group_size", 0, "train.group_size=0: at least 1"),
        ("train__accumulation", 0, "train.accumulation=0: at least 1"),
        ("method__ema_decay", 1.5, "method.ema_decay=1.5"),
        ("method__threshold", 2.0, "method.threshold=2.0: no probability reaches it"),
        ("method__unlabeled_loss", "focal", "unimatch takes ce, balanced_ce, dice"),
        ("method__rampup", -2, "method.rampup=-2: 0 .none. to the 20 steps .* or -1"),
        ("method__rampup", 21, "method.rampup=21: 0 .none. to the 20 steps"),
    ],
)
def test_a_wrong_value_lists_the_valid_ones(key, value, message):
    cfg = tiny.config("method=unimatch,mpmc=recommended", **{key: value})
    with pytest.raises(ValueError, match=message):
        tiny.run(cfg, 0)


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        # Set on the command line, the method comes without what its preset brings.
        ("method=unimatch", {"method__name": "mean_teacher"}, "published runs use"),
        (
            "method=supervised,mpmc=paper",
            {"mpmc__teacher_head": "ema"},
            "keeps no average",
        ),
        (
            "method=mean_teacher",
            {"method__normalization": "own"},
            r"normalization='own' is unknown; valid: \['apart', 'joint'\]",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(argument, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.setup(tiny.config(argument, **changes))


# Crop, GPUs x images, rate of the backbone, of the heads over it, weight decay, epochs,
# decay of the teacher: from the authors' configurations.
PUBLISHED = {
    ("voc", "unimatch"): (321, 4, 2, 1e-3, 10, 1e-4, 80, 0),
    ("voc", "supervised"): (321, 4, 4, 1e-3, 10, 1e-4, 80, 0),
    ("cityscapes", "supervised"): (801, 4, 4, 5e-3, 1, 1e-4, 240, 0),
    ("voc", "augseg"): (513, 2, 8, 1e-3, 10, 1e-4, 80, 0.999),
    ("voc", "u2pl"): (513, 4, 4, 1e-3, 10, 1e-4, 80, 0.99),
    ("voc", "ael"): (513, 8, 2, 1e-2, 10, 1e-4, 80, 0.99),
    ("cityscapes", "unimatch"): (801, 4, 2, 5e-3, 1, 1e-4, 240, 0),
    ("cityscapes", "augseg"): (800, 4, 4, 1e-2, 1, 5e-4, 240, 0.996),
    ("cityscapes", "u2pl"): (769, 8, 2, 1e-2, 1, 5e-4, 200, 0.99),
    ("cityscapes", "ael"): (769, 8, 2, 1e-2, 10, 1e-4, 200, 0.99),
    ("acdc", "unimatch"): (256, 1, 12, 1e-2, 1, 1e-4, 300, 0),
    ("acdc", "supervised"): (256, 1, 24, 1e-2, 1, 1e-4, 300, 0),
}
# Of UniMatch's supervised.py: labeled images (of ACDC slices), steps, and the
# backbone's rate at the first, middle and last step.
BASELINES = [
    ("voc", "", 92, 400, 1.000000e-03, 5.382976e-04, 8.493232e-06),
    ("voc", "", 183, 880, 1.000000e-03, 5.369827e-04, 4.177270e-06),
    ("voc", "", 366, 1840, 1.000000e-03, 5.364109e-04, 2.150755e-06),
    ("voc", "", 732, 3600, 1.000000e-03, 5.361547e-04, 1.175587e-06),
    ("voc", "", 1464, 7280, 1.000000e-03, 5.360192e-04, 6.237474e-07),
    ("voc", "", 662, 3280, 1.000000e-03, 5.361808e-04, 1.278323e-06),
    ("voc", "", 1323, 6560, 1.000000e-03, 5.360338e-04, 6.850362e-07),
    ("voc", "", 2646, 13200, 1.000000e-03, 5.359598e-04, 3.650988e-07),
    ("voc", "", 10582, 52880, 1.000000e-03, 5.359050e-04, 1.047043e-07),
    ("voc", ",crop=513", 366, 1760, 1.000000e-03, 5.364348e-04, 2.238544e-06),
    ("voc", ",crop=513", 662, 3280, 1.000000e-03, 5.361808e-04, 1.278323e-06),
    ("voc", ",crop=513", 1323, 6560, 1.000000e-03, 5.360338e-04, 6.850362e-07),
    ("voc", ",crop=513", 2646, 13200, 1.000000e-03, 5.359598e-04, 3.650988e-07),
    ("voc", ",crop=513", 10582, 52880, 1.000000e-03, 5.359050e-04, 1.047043e-07),
    ("cityscapes", "", 186, 2640, 5.000000e-03, 2.681260e-03, 7.770581e-06),
    ("cityscapes", "", 372, 5520, 5.000000e-03, 2.680307e-03, 4.000846e-06),
    ("cityscapes", "", 744, 11040, 5.000000e-03, 2.679871e-03, 2.144000e-06),
    ("cityscapes", "", 1488, 22320, 5.000000e-03, 2.679650e-03, 1.137817e-06),
    ("acdc", "", 32, 300, 1.000000e-02, 5.391010e-03, 1.100317e-04),
    ("acdc", "", 68, 600, 1.000000e-02, 5.374941e-03, 5.896453e-05),
    ("acdc", "", 136, 1500, 1.000000e-02, 5.365298e-03, 2.584907e-05),
]
TRAINING_IMAGES = {"voc": 10582, "cityscapes": 2975, "acdc": 1312}


def _preset(data_set, method):
    config = base.get_base()
    config.data.name = data_set
    return presets.apply(config, f"method={method}")


@pytest.mark.parametrize(("data_set", "method"), PUBLISHED)
def test_presets_are_the_published_settings(data_set, method):
    config = _preset(data_set, method)
    gpus = config.train.batch_size // config.train.group_size
    found = (
        config.data.crop,
        gpus,
        config.train.group_size,
        config.optimizer.lr,
        config.optimizer.head_multiplier,
        config.optimizer.weight_decay,
        config.train.epochs,
        config.method.ema_decay,
    )
    assert found == PUBLISHED[data_set, method]
    # UniMatch sets its rate after the step; U2PL and AEL published ResNet-101 alone.
    assert config.optimizer.lag == (method in ("unimatch", "supervised"))
    deeper = method in ("u2pl", "ael")
    assert config.model.backbone == ("resnet101" if deeper else "resnet50")


@pytest.mark.parametrize(
    ("method", "protocol"),
    [
        ("unimatch", "slide_unimatch"),
        ("augseg", "slide_unimatch"),
        # Windows moved back at the border: logits of CPS, softmax of UniMatch V2.
        ("cps", "slide_u2pl"),
        ("unimatch_v2", "slide_ael"),
    ],
)
def test_cityscapes_is_scored_in_the_windows_of_the_authors(method, protocol):
    assert _preset("cityscapes", method).eval.protocol == protocol


@pytest.mark.parametrize("method", ["unimatch", "mean_teacher", "fixmatch"])
def test_what_trains_as_unimatch_does_has_its_groups_at_crop_513(method):
    config = base.get_base()
    config.data.name = "voc"
    presets.apply(config, f"method={method},crop=513")
    assert (config.train.batch_size, config.train.group_size) == (8, 4)


@pytest.mark.parametrize("backbone", ["dinov2_b14", "vit_l16", "resnet50"])
def test_a_backbone_leaves_the_padding_of_the_data_set(backbone):
    """Each size of an image is a program, also where images are resized."""
    for name, multiple in (("voc", 256), ("folder", 128)):
        config = base.get_base()
        config.data.name, config.eval.pad_to = name, 128
        presets.apply(config, f"method=unimatch_v2,backbone={backbone}")
        assert config.eval.pad_to == multiple


def test_the_unet_takes_no_settings_of_a_backbone():
    config = base.get_base()
    presets.apply(config, "method=supervised,model=unet,backbone=vit_s16")
    assert (config.model.name, config.model.drop_path) == ("unet", 0.0)
    config_checks.check_read(config)


def test_a_backbone_brings_its_decoder_and_optimizer():
    """UniMatch V2's, on VOC as published, on a ResNet, and on a folder of one's own."""

    def found(data_set, argument):
        config = base.get_base()
        config.data.name = data_set
        presets.apply(config, argument)
        build_base(config, num_classes=5, pixels=RGB, num_unlabeled=10)
        optimizer = config.optimizer
        return (
            config.model.name,
            config.model.backbone,
            config.data.crop,
            optimizer.name,
            optimizer.lr,
            optimizer.head_multiplier,
            optimizer.weight_decay,
            optimizer.lag,
        )

    published = ("adamw", 5e-6, 40.0, 0.01, 1)
    v2 = "method=unimatch_v2"
    assert found("voc", v2) == ("dpt", "dinov2_b14", 518, *published)
    assert found("cityscapes", v2) == ("dpt", "dinov2_b14", 798, *published)
    resnet = ("deeplabv3plus", "resnet50", 518, "sgd", 1e-3, 10.0, 1e-4, 1)
    assert found("voc", f"{v2},backbone=resnet50") == resnet
    mine = ("dpt", "dinov2_s14", 308, *published)
    assert found("folder", f"{v2},backbone=dinov2_s14") == mine
    name, _, crop, *_ = found("folder", "backbone=vit_s16,model=segmenter_linear")
    assert (name, crop) == ("segmenter_linear", 320)


@pytest.mark.parametrize(
    ("data_set", "method", "crop", "gpus", "group", "length"),
    [
        ("voc", "unimatch", 518, 4, 4, (60, 0)),
        ("voc", "fixmatch", 518, 4, 4, (60, 0)),
        ("voc", "mean_teacher", 518, 4, 4, (60, 0)),
        ("voc", "supervised", 518, 4, 8, (60, 5580)),
        ("cityscapes", "unimatch", 798, 4, 2, (180, 0)),
        ("cityscapes", "fixmatch", 798, 4, 2, (180, 0)),
        ("cityscapes", "supervised", 798, 4, 4, (180, 33_660)),
    ],
)
def test_on_dinov2_the_comparators_are_those_of_unimatch_v2(
    data_set, method, crop, gpus, group, length
):
    config = base.get_base()
    config.data.name = data_set
    presets.apply(config, f"method={method},backbone=dinov2_b14")
    train, v2 = config.train, presets.PUBLISHED[data_set]["unimatch_v2"]
    found = (config.data.crop, train.batch_size // train.group_size, train.group_size)
    assert found == (crop, gpus, group)
    assert (train.epochs, train.steps) == length and train.epoch_of == "unlabeled"
    # 3000 labeled images per epoch, on each GPU in whole batches.
    if method == "supervised":
        assert train.steps == train.epochs * (3000 // gpus // group)
        assert train.eval_every == train.steps // train.epochs
    assert config.optimizer.name == "adamw" and config.method.threshold == 0.95
    assert config.eval.protocol == v2.get("eval.protocol", "whole")
    if method == "fixmatch":
        assert (config.fixmatch.teacher, config.method.ema_decay) == ("average", 0.996)
    build_base(config, num_classes=19, pixels=RGB, num_unlabeled=1000)


def test_ael_never_copies_class_0():
    for data_set in presets.PUBLISHED:
        assert 0 in _preset(data_set, "ael").ael.unqueried


def _pretend_prepared(split, monkeypatch):
    """Builds pipelines of the split's ids, of which no image is ever read."""
    info = types.SimpleNamespace(
        facts=types.SimpleNamespace(dataset="published"),
        ids={"train": split.labeled + split.unlabeled},
        present=dict.fromkeys(split.labeled, (0,)),
        warnings=(),
        records=lambda split: None,
    )
    monkeypatch.setattr(data_build, "dataset_info", lambda config: info)
    monkeypatch.setattr(data_build, "build_split", lambda config, info: split)


@pytest.mark.parametrize(
    ("data_set", "crop", "labeled", "steps", "first", "middle", "last"), BASELINES
)
def test_supervised_takes_the_published_steps_at_the_published_rates(
    data_set, crop, labeled, steps, first, middle, last, monkeypatch
):
    config = base.get_base()
    config.data.name = data_set
    presets.apply(config, f"method=supervised{crop}")
    ids = tuple(map(str, range(TRAINING_IMAGES[data_set])))
    split = Split(ids[:labeled], ids[labeled:])
    _pretend_prepared(split, monkeypatch)
    pipeline = data_build.build_train(config, SupervisedOnly.streams)
    schedule = build_schedule(config, pipeline.steps_per_epoch)
    assert schedule.steps == steps
    rates = [float(schedule(step)) for step in (0, steps // 2, steps - 1)]
    np.testing.assert_allclose(rates, (first, middle, last), rtol=1e-5)
    assert schedule(1) == schedule(0)  # set after the step, so that it lags by one
    # Longer where as many steps as the other methods' are asked for.
    if labeled < 0.2 * len(ids):
        config.train.epoch_of = "unlabeled"
        longer = data_build.build_train(config, SupervisedOnly.streams)
        assert longer.steps_per_epoch > 3 * pipeline.steps_per_epoch


@pytest.mark.parametrize("method", ["unimatch", "mean_teacher", "ael"])
def test_epochs_over_the_labeled_list_are_for_supervised_alone(method, monkeypatch):
    config = tiny.config(f"method={method}", train__epoch_of="labeled")
    split = Split(("a", "b"), ("c", "d"))
    _pretend_prepared(split, monkeypatch)
    streams = tiny.setup(tiny.config(f"method={method}")).step.method.streams
    with pytest.raises(ValueError, match="epoch_of='labeled' is for method=supervised"):
        data_build.build_train(config, streams)
    config.train.epoch_of = "both"
    with pytest.raises(ValueError, match="'both' is unknown; valid: labeled, unlab"):
        data_build.build_train(config, streams)


@pytest.mark.parametrize("data_set", presets.PUBLISHED)
@pytest.mark.parametrize("method", presets.METHODS)
def test_every_method_has_a_preset_that_builds_for_every_data_set(data_set, method):
    config = _preset(data_set, method)
    classes = {"voc": 21, "cityscapes": 19, "acdc": 4}[data_set]
    model, built = build_base(
        config, num_classes=classes, pixels=RGB, num_unlabeled=1000
    )
    expected = {"voc": "ce", "cityscapes": "ohem", "acdc": "ce_dice"}[data_set]
    if (data_set, method) == ("voc", "ael"):
        expected = "ohem"
    assert config.method.supervised_loss == expected
    # Published methods have no ramp-up.
    assert config.method.rampup == (-1 if method == "mean_teacher" else 0)
    small_foreground = (data_set, method) == ("acdc", "mean_teacher")
    assert config.method.normalization == ("apart" if small_foreground else "joint")
    assert model.auxiliary == (
        method == "ael" or (data_set, method) == ("cityscapes", "u2pl")
    )
    assert model.embedding == (method == "u2pl")
    if method == "u2pl":
        assert built.phase(0) is built or data_set != "cityscapes"
        assert model.variant == "u2pl"


@pytest.mark.parametrize("devices", [-1, 5])
def test_more_devices_than_there_are_is_refused(devices):
    with pytest.raises(ValueError, match="4 devices in 1 process"):
        Parallel("pmap", Layout(4, 2, 1), devices)


def test_an_unknown_key_is_refused():
    with pytest.raises((KeyError, AttributeError)):
        base.get_base().train.bach_size = 3


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("unimatch", "normalization", "apart"),
        ("augseg", "cutmix", False),
        ("supervised", "rampup", 2),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(method, key, value):
    argument = f"method={method}"
    name = f"method__{key}"
    with pytest.raises(ValueError, match=f"method.{key}=.*{value}"):
        tiny.setup(tiny.config(argument, **{name: value}))
