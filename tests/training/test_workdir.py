"""A run's directory: whose it is, and what may change under it."""

import json
import math

import pytest

from mpmc_jax.experiments import config_checks
from mpmc_jax.training import workdir
from tests.support import tiny
from tests.support.json_fuzz import mutations

FACTS = {"data": {"fingerprint": "a"}, "steps_per_epoch": 5}


def _claim(directory, config, facts=FACTS, **circumstances):
    """What a run does with its directory before it trains."""
    workdir.make(directory)
    workdir.check(directory, config, facts)
    workdir.write(directory, config, facts, {**circumstances, "data": facts["data"]})


def _load(directory, config):
    """The configuration of the run of `config`, as evaluation reads it back."""
    run = workdir.trained_on(config, FACTS)
    return workdir.load(directory, tiny.config("method=supervised"), run)


def test_a_workdir_of_another_run_is_refused_with_the_difference(tmp_path):
    cfg = tiny.config("method=supervised", optimizer__lr=0.01)
    other = tiny.config("method=supervised", optimizer__lr=0.5)
    # One that saved nothing makes room.
    _claim(tmp_path, other)
    _claim(tmp_path, cfg)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, cfg)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(workdir.WorkdirError) as caught:
        _claim(tmp_path, other)
    assert "optimizer.lr: 0.01 there, 0.5 now" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(workdir.WorkdirError, match=r"optimizer.lr: 0\.01 there, 0\.5"):
        _load(tmp_path, other)
    other = tiny.config("method=supervised")
    with other.unlocked():
        other.format_version = 0
    with pytest.raises(workdir.WorkdirError, match="format_version 3"):
        _claim(tmp_path, other)
    with pytest.raises(workdir.WorkdirError, match="format_version 0"):
        _load(tmp_path, other)


@pytest.mark.parametrize(
    "name",
    [
        "classes.json",
        "Images/a.png",
        "masks/a.png",
        "1.0.0/dataset_info.json",
        "folder/1.0.0/dataset_info.json",
    ],
)
def test_a_folder_of_data_is_no_workdir(tmp_path, name):
    folder = tmp_path / "my_data"
    workdir.check_not_data(folder)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).touch()
    with pytest.raises(workdir.WorkdirError, match="looks like a folder of data") as at:
        workdir.check_not_data(folder)
    assert str(folder) in str(at.value) and "--workdir=runs/my_data" in str(at.value)
    (folder / "config.json").touch()  # A run that is there already resumes.
    workdir.check_not_data(folder)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0\0", '{"data": 5}'])
def test_files_beside_checkpoints_may_be_lost_or_damaged(tmp_path, text, caplog):
    cfg = tiny.config("method=supervised", optimizer__lr=0.01)
    _claim(tmp_path, cfg)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    names = (
        ["config.json", "manifest.json"] if text != '{"data": 5}' else ["manifest.json"]
    )
    for name in names:
        path = tmp_path / name
        path.unlink() if text is None else path.write_text(text)
    assert _load(tmp_path, cfg).optimizer.lr == 0.01
    run = workdir.trained_on(cfg, FACTS)
    assert workdir.read_manifest(tmp_path, run)["data"] == FACTS["data"]
    with pytest.raises(workdir.WorkdirError, match="no intact"):
        workdir.read_manifest(tmp_path)
    _claim(tmp_path, cfg, revision="2")
    for name in names:
        assert f"{name} is {'missing' if text is None else 'damaged'}" in caplog.text
        damaged = tmp_path / f"{name}.damaged"
        assert damaged.exists() == (text is not None)
        assert text is None or damaged.read_text() == text
    assert workdir.read_manifest(tmp_path)["revision"] == "2"
    assert _load(tmp_path, cfg).optimizer.lr == 0.01


def test_how_a_run_is_done_may_change(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, tiny.config("method=supervised"))
    other = tiny.config("method=supervised", train__devices=2, data__data_dir="moved")
    _claim(tmp_path, other)
    assert _load(tmp_path, tiny.config("method=supervised")).data.data_dir == "moved"


def test_evaluations_that_change_training_keep_their_interval(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, tiny.config("method=supervised", train__eval_every=5))
    _claim(tmp_path, tiny.config("method=supervised", train__eval_every=7))
    recomputing = {"train__precise_bn": 2}
    other = tmp_path / "recomputing"
    (other / "checkpoints" / "3").mkdir(parents=True)
    _claim(other, tiny.config("method=supervised", train__eval_every=5, **recomputing))
    changed = tiny.config("method=supervised", train__eval_every=7, **recomputing)
    with pytest.raises(
        workdir.WorkdirError, match=r"train\.eval_every: 5 there, 7 now"
    ):
        _claim(other, changed)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_value_typed_wrong_is_found_or_makes_no_difference(tmp_path, name):
    """Every value in turn; what is accepted must be what the run was trained on."""
    cfg = tiny.config("method=supervised")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    facts = {"data": {"fingerprint": "a", "labeled": 3}, "steps_per_epoch": 5}
    _claim(tmp_path, cfg, facts, seed=0, versions={"jax": "1"})
    _claim(tmp_path, cfg, facts, seed=0, versions={"jax": "2"})
    run = workdir.trained_on(cfg, facts)
    whole, refused = (tmp_path / name).read_text(), 0
    for _, changed in mutations(whole):
        (tmp_path / name).write_text(changed)
        try:
            base = tiny.config("method=supervised")
            found = workdir.load(tmp_path, base, run)
            manifest = workdir.read_manifest(tmp_path, run)
            workdir.check(tmp_path, cfg, facts)
        except workdir.WorkdirError:
            refused += 1
            continue
        assert workdir.trained_on(found, facts) == run
        assert manifest["data"] == facts["data"]
    # Most of what config.json holds is checked, and the data of the manifest.
    assert refused > (100 if name == "config.json" else 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer__lr", -1.0, "optimizer.lr=-1.0 must not be negative"),
        ("mpmc__alpha", -1.0, "mpmc.alpha=-1.0 must not be negative"),
        ("model__width", 0, "model.width=0 must be positive"),
        ("data__crop", 1, "data.crop=1: crops need at least 16 pixels a side"),
        ("train__group_size", 0, "train.group_size=0 must be positive"),
        ("seed", -1, "seed=-1 must not be negative"),
        ("data__threads", -2, "data.threads=-2: give a number of threads, 0 for none"),
        ("optimizer__lr", float("nan"), "optimizer.lr=nan must be finite"),
        ("eval__scales", (1.0, float("inf")), "eval.scales=inf must be finite"),
        ("seed", 2**32, "seed=4294967296 must be less than 2 .. 32"),
        ("data__split_seed", 10**30, "data.split_seed=10+ must be less than"),
        ("train__steps", 2**31, "train.steps=2147483648 must lie within 2147483647"),
        ("mpmc__windows", (1, -(10**30)), "mpmc.windows=-10+ must lie within"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(key, value, message):
    config_checks.check_ranges(tiny.config("method=supervised"))
    with pytest.raises(ValueError, match=message):
        config_checks.check_ranges(tiny.config("method=supervised", **{key: value}))


@pytest.mark.parametrize(
    ("argument", "changes", "setting", "value"),
    [
        ("method=supervised", {"data__geometry": "acdc"}, "data__flip", False),
        ("method=supervised", {"data__geometry": "acdc"}, "data__scale_min", 0.8),
        ("method=supervised", {"data__geometry": "acdc"}, "data__scale_max", 1.5),
        ("method=supervised", {}, "imbalance__focal_gamma", 5.0),
        ("method=supervised", {}, "model__drop_path", 0.1),
        ("method=supervised,model=unet", {}, "model__drop_path", 0.1),
        ("method=cps", {}, "model__teacher_dtype", "bfloat16"),
        ("method=cps", {"method__cutmix": False}, "cps__weight", 3.0),
        ("method=cps", {}, "cps__plain_weight", 3.0),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(argument, changes, setting, value):
    config_checks.check_read(tiny.config(argument, **changes))
    name = setting.replace("__", ".")
    with pytest.raises(ValueError, match=f"^{name}={value} does not act on [^;]+; lea"):
        config_checks.check_read(tiny.config(argument, **changes, **{setting: value}))


def test_settings_are_taken_where_they_are_read():
    for argument, changes in (
        ("method=supervised", {"data__flip": False, "data__scale_min": 0.8}),
        ("method=augseg", {"model__backbone": "vit_xs16", "model__drop_path": 0.2}),
        ("method=cps,mpmc=paper", {"model__teacher_dtype": "bfloat16"}),
        ("method=unimatch", {"model__teacher_dtype": "bfloat16"}),
        ("method=cps", {"cps__weight": 3.0}),
        ("method=cps", {"cps__plain_weight": 3.0, "method__cutmix": False}),
    ):
        config_checks.check_read(tiny.config(argument, **changes))


def test_every_number_of_a_configuration_is_looked_at():
    """Seeds of 32 bits pass; no key takes an infinity, whatever else checks it."""
    config_checks.check_ranges(tiny.config("method=supervised", seed=2**32 - 1))
    cfg = tiny.config("method=supervised")
    keys = [k for k, v in workdir.flatten(cfg.to_dict()).items() if type(v) is float]
    assert len(keys) > 20 and "method.threshold" in keys
    for key in keys:
        cfg = tiny.config("method=supervised", **{key.replace(".", "__"): math.inf})
        with pytest.raises(ValueError, match=f"^{key}=inf must be finite$"):
            config_checks.check_ranges(cfg)


def test_a_run_from_before_missing_values_goes_on(tmp_path):
    cfg, old = tiny.config("method=supervised"), {"low": [0.0, 0.0]}
    new = {**old, "nodata": [], "nodata_fill": [0.0, 0.0]}
    facts = [{"data": {"pixels": pixels}} for pixels in (old, new)]
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, cfg, facts[0])
    for each in facts:
        workdir.check(tmp_path, cfg, facts[1])
        read = workdir.read_manifest(tmp_path, workdir.trained_on(cfg, each))
        assert read["data"]["pixels"] == new
    other = {"data": {"pixels": {**new, "nodata": ["nan"]}}}
    with pytest.raises(workdir.WorkdirError, match=r"data.pixels.nodata: \[\] there"):
        workdir.check(tmp_path, cfg, other)


@pytest.mark.parametrize(("cutmix", "weight"), [(True, 1.5), (False, 1.0)])
def test_cps_without_cutmix_goes_on_with_the_weight_it_had(cutmix, weight):
    saved = tiny.config("method=cps", method__cutmix=cutmix).to_dict()
    del saved["cps"]["plain_weight"]
    assert workdir.complete(saved)["cps"]["plain_weight"] == weight


def test_a_run_from_before_a_setting_came_goes_on_with_what_it_did(tmp_path):
    cfg = tiny.config("method=supervised")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, cfg)
    path, run = tmp_path / "config.json", workdir.trained_on(cfg, FACTS)
    for found in (written := json.loads(path.read_text()), run["config"]):
        for name in workdir._LATER:
            section, _, key = name.partition(".")
            del found[section][key]
            if not found[section]:
                del found[section]
        found["model"]["remat"] = False
    path.write_text(json.dumps(written))
    loaded = workdir.load(tmp_path, tiny.config("method=supervised"), run)
    assert loaded.to_dict() == cfg.to_dict()
    _claim(tmp_path, cfg)
    other = tiny.config("method=supervised", optimizer__name="adamw")
    path.write_text(json.dumps(written))
    with pytest.raises(workdir.WorkdirError, match="name: 'sgd' there, 'adamw' now"):
        _claim(tmp_path, other)
    # What is missing without having come later is missing still.
    del run["config"]["optimizer"]["lr"]
    with pytest.raises(workdir.WorkdirError, match=r"missing keys \['optimizer.lr'\]"):
        workdir.load(tmp_path, tiny.config("method=supervised"), run)


def test_rematerialization_was_a_switch():
    for before, now in ((False, "off"), (True, "all"), ("cheap", "cheap"), (0, 0)):
        assert workdir.complete({"model": {"remat": before}})["model"]["remat"] == now


def test_a_run_keeps_its_data_and_lists_its_parts(tmp_path):
    cfg = tiny.config("method=supervised")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    _claim(tmp_path, cfg, revision="1")
    _claim(tmp_path, cfg, revision="2")
    found = workdir.read_manifest(tmp_path)
    assert found["revision"] == "1"
    assert found["resumed"] == [{"revision": "2"}]
    other = {**FACTS, "data": {"fingerprint": "b"}}
    with pytest.raises(workdir.WorkdirError, match="data.fingerprint: 'a' there, 'b'"):
        _claim(tmp_path, cfg, other, revision="3")
    assert workdir.read_manifest(tmp_path) == found
    run = workdir.trained_on(cfg, other)
    with pytest.raises(workdir.WorkdirError, match="data.fingerprint: 'a' there, 'b'"):
        workdir.read_manifest(tmp_path, run)
