import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.base import get_base
from launch import evaluate
from launch.experiments import __main__ as experiments
from mpmc_jax.analysis import summary
from mpmc_jax.data.build import build_split, dataset_info
from mpmc_jax.data.splits import Split
from mpmc_jax.experiments.paper import base, registry
from mpmc_jax.experiments.paper.base import Choice, Experiment, labeled_part
from mpmc_jax.experiments.paper.final_evaluation import (
    FinalEvaluation,
    final_evaluation,
)
from mpmc_jax.experiments.paper.results import (
    last_line,
    other_run,
    planned_data,
    read_outcome,
)
from tests.support.data_sets import prepare_synthetic
from tests.support.planned import place_of, write_run

TOY = Experiment(
    "A comparison",
    "synthetic",
    {
        "off": Choice("Off", {"method": "supervised", "mpmc": "off"}),
        "on": Choice("On", {"method": "supervised", "mpmc": "paper"}, baseline="off"),
    },
    {"4": labeled_part("4")},
)


@pytest.fixture
def toy(monkeypatch):
    """An experiment is one file and one registry line."""
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", TOY)
    published = {"source": "Table 0", "columns": ["4"], "rows": {"off": [40.0]}}
    monkeypatch.setattr(base, "read_published", lambda name: published)
    return TOY


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_published_values_stand_in_rows_and_columns_of_the_table(name):
    experiment, published = registry.EXPERIMENTS[name], base.read_published(name)
    assert published["source"]
    assert set(published["columns"]) == set(experiment.columns)
    assert set(published["rows"]) == set(experiment.rows) or name == "table4"
    for values in published["rows"].values():
        assert len(values) == len(published["columns"])
        assert all(math.isnan(value) or 40 < value < 100 for value in values)
    assert set(published.get("classes", {})) <= set(experiment.rows)


def test_table_5_runs_on_the_backbone_of_its_published_baseline():
    """66.3, 72.8 and 75.0 are UniMatch's supervised baseline on ResNet-101."""
    runs = base.plan("table5", registry.EXPERIMENTS["table5"]).runs
    assert {run.argument["backbone"] for run in runs} == {"resnet101"}


def test_published_gains_are_those_of_the_paper():
    def gain(name, row, column):
        table = base.plan(name, registry.EXPERIMENTS[name])
        value = {(cell.row, cell.column): cell for cell in table.cells}
        cell = value[row, column]
        return round(cell.published - value[cell.baseline, column].published, 1)

    assert gain("table1", "unimatch_mpmc_resnet101", "classic_92") == 2.1
    assert gain("table1", "ael_mpmc_resnet50", "blender_1_4") == 1.7
    assert gain("table2", "u2pl_mpmc_resnet101", "1_16") == 2.3
    assert gain("table3", "augseg_mpmc", "3") == 3.5
    assert gain("table5", "supervised_mpmc", "1_4") == 1.3
    assert gain("table6", "both", "1_8") == 3.2
    assert gain("supp_table1", "windows_1_7_19", "1_16") == 1.6


@pytest.mark.parametrize("name", registry.all_experiments())
def test_every_run_is_a_configuration_with_a_name_of_its_own(name):
    table = base.plan(name, registry.all_experiments()[name], seeds=(0, 1))
    found = {}
    for run in table.runs:
        config = experiments._configuration(run.flags()).to_dict()
        assert config["seed"] == run.seed
        for key, value in {**run.common, **run.settings}.items():
            section, _, last = key.partition(".")
            assert config[section][last] == value
        found[run.name] = json.dumps(config)
    assert len(set(found.values())) == len(found)
    assert all("/" not in run and " " not in run for run in found)


def test_rows_that_become_equal_are_kept_once():
    experiment = registry.EXPERIMENTS["table2"]
    changes = {"backbone": "resnet18", "mpmc": "recommended"}
    table = base.plan("table2", experiment, dataset="camvid", changes=changes)
    assert len(table.rows) == len(experiment.rows) // 2
    assert [*table.columns] == ["1_8"]
    modes = [cell.runs[0].argument["mpmc"] for cell in table.cells]
    assert modes == ["off", "recommended"] * 4
    assert all(math.isnan(cell.published) for cell in table.cells)


def test_bad_arguments_name_the_valid_ones():
    experiment = registry.EXPERIMENTS["table6"]
    with pytest.raises(ValueError, match="valid: off, labeled, unlabeled, both"):
        base.plan("table6", experiment, only=["all"])
    with pytest.raises(ValueError, match="distinct"):
        base.plan("table6", experiment, seeds=(1, 1))


def test_the_summary_is_the_scores_mean_and_deviation(toy, tmp_path):
    place = place_of(tmp_path, "--config.train.steps=20")
    table = base.plan("toy", toy, seeds=(0, 1, 2))
    by_row = {cell.row: cell.runs for cell in table.cells}
    off = [[0.1, 0.3, 0.2, 0.25], [0.2, 0.2, 0.4, 0.35], [0.1, 0.1, 0.1, 0.3]]
    on = [[0.1, 0.5, 0.4, 0.45], [0.3, 0.3, 0.5, 0.45]]
    for run, scores in zip(by_row["off"], off, strict=True):
        write_run(place, run, scores)
    for run, scores in zip(by_row["on"], on, strict=False):
        write_run(place, run, scores)
    paper = [get_base().to_dict()]
    found = summary.summarize(table, place, paper)
    first, second = found.lines
    np.testing.assert_allclose(first.last, [25, 35, 30])
    np.testing.assert_allclose(first.best, [30, 40, 30])
    np.testing.assert_allclose(first.difference, 100 / 3 - 40)
    assert first.state == "" and second.state == "1 run not run"
    np.testing.assert_allclose(second.gains, [20, 10])
    row = second.as_row()
    np.testing.assert_allclose(row["gains_std"], np.std([20, 10], ddof=1))
    assert row["published"] == "" and row["seeds"] == 2
    text = found.markdown()
    assert (
        "| Off | 4 | 30.0 ± 5.0 | 33.3 ± 5.8 | 33.3 ± 5.8 | 40.0 | -6.7 | - | - |  |"
        in text
    )
    assert "| length | 20 steps | 80 epochs |" in text and "| device | cpu |" in text
    assert found.drawing().png[:4] == b"\x89PNG"


def test_differences_are_of_scores_evaluated_as_published(toy, tmp_path):
    """Training pads images; the published values are of images as they are."""
    flags = ("--config.train.steps=20", "--config.eval.pad_to=32")
    place = place_of(tmp_path, *flags)
    table = base.plan("toy", toy)
    for run in table.runs:
        write_run(place, run, [0.1, 0.5, 0.4, 0.45])
    off, on = summary.summarize(table, place, []).lines
    assert (off.best, off.scored, off.gains) == ((50,), (), ())
    assert off.state == "1 run not scored yet (images without padding)"
    failure = place.failure(table.runs[0])
    failure.parent.mkdir()
    failure.write_text("out of memory\n")
    failed = summary.summarize(table, place, []).failures
    assert failed == {table.runs[0].name: "out of memory"}
    assert math.isnan(off.difference)
    paths = [place.workdir(run) / "eval_val_best.json" for run in table.runs]
    first, second = (
        {"scalars": {"miou": score}, "step": 10, "pad_to": 0} for score in (0.375, 0.5)
    )
    paths[0].write_text(json.dumps(first))
    paths[1].write_text(json.dumps(second))
    off, on = summary.summarize(table, place, []).lines
    assert (off.best, off.scored, off.difference) == ((50,), (37.5,), -2.5)
    assert on.gains == (12.5,) and on.state == ""
    # One of padded images, and one of a checkpoint that is not the best.
    for wrong in ({"pad_to": 32}, {"step": 15}):
        paths[1].write_text(json.dumps(second | wrong))
        assert summary.summarize(table, place, []).lines[1].scored == ()


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_cells_are_scored_as_their_published_values(name):
    """Of the paper's runs, VOC's are padded in training, and some see centers alone."""
    for run in base.plan(name, registry.EXPERIMENTS[name]).runs:
        config = experiments._configuration(run.flags())
        evaluation = final_evaluation(config)
        windows = {"u2pl": "slide_u2pl", "ael": "slide_ael"}
        expected = {
            "voc": FinalEvaluation(""),
            "cityscapes": FinalEvaluation(windows.get(config.method.name, "")),
            "acdc": None,
        }[config.data.name]
        if config.data.name == "cityscapes" and config.method.name not in windows:
            expected = None
        assert evaluation == expected


@pytest.mark.parametrize("evaluation", [FinalEvaluation(""), FinalEvaluation("whole")])
def test_launch_evaluate_writes_the_file_that_tables_read(evaluation, monkeypatch):
    found = []
    monkeypatch.setattr(
        evaluate, "open_network", lambda args: found.append(args) or sys.exit()
    )
    with pytest.raises(SystemExit):
        evaluate.main(["--workdir=run", *evaluation.flags])
    (args,) = found
    config = SimpleNamespace(eval=SimpleNamespace(scales=(1.0,)))
    run: Any = SimpleNamespace(
        config=config, facts=SimpleNamespace(dataset="d", fingerprint="f")
    )
    assert evaluate.result_name(run, args, args.checkpoint) == evaluation.file_name


def test_class_columns_are_read_at_the_same_evaluations(toy, tmp_path):
    place = place_of(tmp_path, "--config.train.steps=20")
    experiment = dataclasses.replace(toy, per_class=True)
    table = base.plan("toy", experiment)
    for run in table.runs:
        write_run(place, run, [0.1, 0.3, 0.2, 0.2], sky=[0.1, 0.2, 0.8, 0.9])
    found = summary.summarize(table, place, [])
    of_sky = next(line for line in found.lines if line.column == "4, sky")
    np.testing.assert_allclose((of_sky.last, of_sky.best), ([90], [20]))


def test_what_is_known_about_a_run(toy, tmp_path):
    place = place_of(tmp_path, "--config.train.steps=20")
    first, second = base.plan("toy", toy).runs
    assert read_outcome(first, place).state == "not run"
    write_run(place, first, [0.1, None])
    found = read_outcome(first, place)
    assert (found.state, found.step, found.steps) == ("unfinished", 10, 20)
    assert found.best() == 0.1 and math.isnan(found.last())
    metrics = place.workdir(first) / "metrics.jsonl"
    metrics.write_text("no line\n" + metrics.read_text())
    found = read_outcome(first, place)
    assert found.state == "failed" and "line 1 cannot be read" in found.reason
    place.log(second).parent.mkdir()
    place.failure(second).write_text("no data\n")
    found = read_outcome(second, place)
    assert (found.state, found.reason) == ("failed", "no data")
    assert last_line(place.log(second)) == "it printed nothing"


def test_a_run_with_other_settings_is_named_and_never_counted(toy, tmp_path):
    place = place_of(tmp_path, "--config.train.steps=20")
    table = base.plan("toy", toy)
    off, on = table.runs
    scores = [0.1, 0.3, 0.2, 0.25]
    # What does not change the result may differ, and paths of the lists.
    harmless = {"data.data_dir": "elsewhere", "data.labeled_ids": "labeled.txt"}
    write_run(place, off, scores, changes={**harmless, "mpmc.tap": "layer2"})
    assert read_outcome(off, place).state == "finished"
    write_run(place, on, scores, changes={"optimizer.lr": 0.5, "data.crop": 7})
    planned = place.configure(on)
    found = other_run(on, place)
    assert found == (
        f"holds another run (data.crop=7 there, {planned.data.crop} planned; "
        f"optimizer.lr=0.5 there, {planned.optimizer.lr} planned); choose another "
        "--output"
    )
    # Evaluations change training where they recompute batch norm's statistics.
    rhythm = {"train.eval_every": 5}
    recomputing = "--config.train.precise_bn=2"
    for folder, flags, said in (
        ("plain", (), ""),
        ("recomputing", (recomputing,), "train.eval_every=5 there"),
    ):
        other = place_of(tmp_path / folder, "--config.train.steps=20", *flags)
        write_run(other, off, scores, changes=rhythm)
        assert said in other_run(off, other)
        assert bool(said) == bool(other_run(off, other))
    # Alpha is read without MPMC too.
    elsewhere = place_of(tmp_path / "alpha", "--config.train.steps=20")
    write_run(elsewhere, off, scores, changes={"mpmc.alpha": 2.0})
    assert "mpmc.alpha=2.0 there" in other_run(off, elsewhere)
    outcome = read_outcome(on, place)
    assert (outcome.state, outcome.reason) == ("failed", found)
    made = summary.summarize(table, place, [])
    assert [line.last for line in made.lines] == [(25,), ()]
    assert f"- `{on.name}`: {found}" in made.markdown()
    arguments = ["--name=toy", f"--output={tmp_path}", "--config.train.steps=20"]
    with pytest.raises(SystemExit, match=f"{on.name} holds another run"):
        experiments.main([*arguments, "--dry_run"])


@pytest.mark.parametrize("path", ["./weights/x.safetensors", "~/x.safetensors"])
def test_paths_are_those_that_training_writes(toy, tmp_path, path):
    """It expands them, and a finished run is no other one for that."""
    flags = ("--config.train.steps=20", f"--config.model.pretrained={path}")
    place = place_of(tmp_path, *flags)
    (run, *_) = base.plan("toy", toy).runs
    written = str(Path(path).expanduser())
    assert written != path
    write_run(place, run, [0.1], changes={"model.pretrained": written})
    assert other_run(run, place) == ""


def test_a_run_of_other_data_is_named_and_never_counted(toy, tmp_path):
    """Neither its name nor its settings tell the lists of labeled images."""
    prepare_synthetic(tmp_path / "data", train=12, val=2)
    lists = tmp_path / "lists" / "4"
    settings = (
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.train.steps=20",
    )
    flags = ("--name=toy", f"--output={tmp_path / 'out'}", *settings)
    place = place_of(tmp_path / "out", *settings)
    off, _ = base.plan("toy", toy).runs
    planned = planned_data(place.configure(off))
    info = dataset_info(place.configure(off))
    assert planned["fingerprint"] == info.facts.fingerprint
    write_run(place, off, [0.1, 0.3, 0.2, 0.25], data=planned)
    assert read_outcome(off, place).state == "finished"
    experiments.main([*flags, "--dry_run"])
    # The same images as lists are the same data, others are not.
    drawn = build_split(place.configure(off), info)
    drawn.save(lists)
    experiments.main([*flags, f"--lists={lists.parent}", "--dry_run"])
    Split(drawn.unlabeled[:4], drawn.unlabeled[4:] + drawn.labeled).save(lists)
    with pytest.raises(SystemExit, match="seed0 holds a run of other data .labeled"):
        experiments.main([*flags, f"--lists={lists.parent}", "--dry_run"])
    # Data prepared again of other files.
    (place.workdir(off) / "manifest.json").write_text(
        json.dumps({"steps_per_epoch": 7, "data": {**planned, "fingerprint": "0"}})
    )
    found = read_outcome(off, place)
    assert found.state == "failed" and "fingerprint 0 there" in found.reason
    # Nor do lists that are not there end what reads other runs.
    absent = f"--config.data.labeled_ids={tmp_path / 'absent.txt'}"
    found = read_outcome(off, place_of(tmp_path / "out", *settings, absent))
    assert found.state == "failed" and "absent.txt" in found.reason
    any_data = dataclasses.replace(place, data=None)
    assert read_outcome(off, any_data).state == "finished"


def test_a_cell_and_a_gain_are_of_runs_of_one_data_set(toy, tmp_path):
    """Also where the data set is not prepared, so that the plan's is not known."""
    place = place_of(tmp_path, "--config.train.steps=20", "--config.data.data_dir=no")
    table = base.plan("toy", toy, seeds=(0, 1))
    off, on = (cell.runs for cell in table.cells)
    scores = [0.1, 0.3, 0.2, 0.25]
    for run in off:
        write_run(place, run, scores, data={"split_crc32": 1})
    write_run(place, on[0], scores, data={"split_crc32": 2})
    _, line = summary.summarize(table, place, []).lines
    left_out = "1 run not run, 1 gain left out: the baseline has other data"
    assert (line.best, line.gains, line.state) == ((30,), (), left_out)
    write_run(place, on[1], scores, data={"split_crc32": 1})
    _, line = summary.summarize(table, place, []).lines
    assert (line.best, line.gains) == ((), ())
    assert line.state == "its seeds differ in their data"


def test_tables_share_a_folder_and_our_own_have_another(capsys):
    names = {}
    for name, experiment in registry.EXPERIMENTS.items():
        for run in base.plan(name, experiment).runs:
            config = experiments._configuration(run.flags()).to_dict()
            assert names.setdefault(run.name, config) == config
    for name, folder in (("table3", "runs/paper/"), ("evidence1", "runs/evidence/")):
        experiments.main([f"--name={name}", "--only=supervised", "--print_commands"])
        assert f"--workdir={folder}runs/acdc-sup" in capsys.readouterr().out


def test_a_run_counts_by_its_own_metric_and_patience(toy, tmp_path):
    flags = {"eval.best_metric": "iou/sky", "train.patience": 2}
    place = place_of(
        tmp_path,
        "--config.train.steps=20",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    )
    first, second = base.plan("toy", toy).runs
    write_run(place, first, [0.1, 0.2, 0.3], sky=[0.4, 0.5, 0.4])
    found = read_outcome(first, place)
    assert (found.state, found.metric) == ("unfinished", "val/iou/sky")
    assert (found.last(), found.best(), found.best("val/miou")) == (0.4, 0.5, 0.2)
    write_run(place, second, [0.1, 0.2, 0.3], sky=[0.5, 0.4, 0.4])
    found = read_outcome(second, place)
    assert (found.state, found.step, found.steps) == ("finished", 15, 20)


def test_the_command_line_lists_plans_and_refuses(capsys, tmp_path):
    experiments.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry.all_experiments())
    arguments = ["--name=table6", "--print_commands", f"--output={tmp_path}"]
    experiments.main([*arguments, "--config.model.pretrained={backbone}.safetensors"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all("--config.model.pretrained=resnet50.safetensors" in x for x in lines)
    for wrong, message in (
        (["--dataset=coco"], "valid: "),
        (["--config.model.depth=3"], "unknown configuration key"),
        (["--config.model.width=wide"], "width"),
        (["--checkpoint=best"], "is for figures"),
        (["--seeds=a"], "whole numbers"),
        (["--summarize"], "at most"),
        (["--lines"], "unexpected arguments"),
    ):
        with pytest.raises(SystemExit) as ended:
            experiments.main([*arguments, *wrong])
        assert message in str(ended.value) and str(ended.value).startswith("error: ")
    with pytest.raises(SystemExit, match="is unknown; valid: table1"):
        experiments.main(["--name=table7"])


def test_hours_are_those_of_the_measured_speed(capsys, tmp_path):
    arguments = ["--name=table6", "--only=off", "--splits=1_8", f"--output={tmp_path}"]
    (run,) = base.plan(
        "table6", registry.EXPERIMENTS["table6"], only=["off"], splits=["1_8"]
    ).runs
    place = place_of(tmp_path)
    write_run(place, run, [0.1], steps=2000)
    path = place.workdir(run) / "metrics.jsonl"
    speeds = (1.0, 4.0, 100.0)
    text = [json.dumps({"step": 1, "train/images_per_second": x}) for x in speeds]
    path.write_text("\n".join([*text, ""]))
    experiments.main([*arguments, "--dry_run", "--steps=2000"])
    line, total = capsys.readouterr().out.splitlines()
    # 8 labeled and 8 unlabeled images a step.
    assert float(line.split()[0]) == round(2000 * 16 / 4 / 3600, 2)
    assert "measured, unfinished: python -m launch.train" in line
    assert "1 run" in total
