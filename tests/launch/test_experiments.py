"""Experiments as a user runs them."""

import dataclasses
import json
import os
import signal
import sys
import time

import pytest

from launch.experiments import __main__ as experiments
from launch.experiments import processes
from mpmc_jax.experiments.paper import base, registry
from mpmc_jax.experiments.paper.base import Choice, Experiment, labeled_part
from mpmc_jax.experiments.paper.final_evaluation import is_due
from mpmc_jax.experiments.paper.results import read_outcome
from mpmc_jax.training.loop import Interrupted
from tests.support import programs, tiny
from tests.support.data_sets import prepare_synthetic
from tests.support.planned import place_of, write_run
from tests.support.programs import run, start

_ARGUMENT = {"method": "supervised", "mpmc": "off"}
TOY = Experiment(
    "One of three runs fails",
    "synthetic",
    {
        "good": Choice("Good", _ARGUMENT),
        "bad": Choice("Bad", _ARGUMENT, {"optimizer.lr": 1e38}, "good"),
        "better": Choice("Better", _ARGUMENT, {"optimizer.lr": 0.1}, "good"),
    },
    {"4": labeled_part("4")},
)
# One or two rows of each table; what they share is trained once. That every row builds
# is tested in test_reproduction.py.
ROWS = {
    "table1": "augseg_resnet50,augseg_mpmc_resnet50",
    "table2": "augseg_resnet50,augseg_mpmc_resnet50",
    "table3": "augseg,augseg_mpmc",
    "table4": "mean_teacher,mean_teacher_mpmc",
    "table5": "supervised,supervised_mpmc",
    "table6": "off,both",
    "supp_table1": "windows_7_19",
    "supp_table2": "alpha_0.3",
    "supp_table3": "beta_0.0",
    "supp_table4": "unimatch",
    "supp_table5": "decoder",
    "supp_table6": "augseg,augseg_mpmc",
}
SMALL = (
    *("--dataset=synthetic", "--splits=4", "--steps=2", "--config.train.eval_every=2"),
    *("--config.model.width=8", "--config.data.crop=33", "--config.train.batch_size=4"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("experiments")
    prepare_synthetic(place / "data", train=13, val=4)
    return place


def arguments(place, name, *more, backbone=tiny.BACKBONE):
    return (
        *("launch.experiments", f"--name={name}", f"--output={place / 'out'}"),
        *(f"--data_dir={place / 'data'}", f"--backbone={backbone}", *SMALL, *more),
    )


def planned(count):
    rows = {
        str(i): Choice(str(i), _ARGUMENT, {"data.crop": 33 + i}) for i in range(count)
    }
    toy = Experiment("", "synthetic", rows, {"4": labeled_part("4")})
    return base.plan("table6", toy, dataset="camvid").runs


def python(code):
    return [sys.executable, "-c", code]


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    runs, place = planned(3), place_of(tmp_path)
    codes = ["print('fine')", "import sys; sys.exit('error: no such thing')", ""]
    commands = {r.name: python(c) for r, c in zip(runs, codes, strict=True)}
    assert processes.train_all(runs, commands, place, jobs=2) == 1
    assert [read_outcome(each, place).state for each in runs] == [
        "not run",
        "failed",
        "not run",
    ]
    assert read_outcome(runs[1], place).reason == "no such thing"
    assert place.log(runs[0]).read_text() == "fine\n"
    said = capsys.readouterr().err
    assert "FAILED" in said and said.count("finished, ") == 2
    # The next try forgets the failure.
    again = commands | {runs[1].name: python("")}
    assert processes.train_all(runs, again, place, jobs=1) == 0
    assert read_outcome(runs[1], place).state == "not run"


def test_devices_are_shared_among_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    runs, place = planned(2), place_of(tmp_path)
    show = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"
    commands = {each.name: python(show) for each in runs}
    processes.train_all(runs, commands, place, jobs=2)
    shown = sorted(place.log(each).read_text() for each in runs)
    assert shown == ["0,2\n", "1,3\n"]


@pytest.mark.parametrize(
    ("hours", "text"), [(0.0, "0.00 h"), (1e-5, "< 0.01 h"), (12.344, "12.34 h")]
)
def test_few_hours_are_not_none(hours, text):
    assert experiments._hours(hours) == f"{text:>10}"


def test_what_is_missing_is_said_before_the_first_run(tmp_path, place, capsys):
    with pytest.raises(SystemExit, match="give --name=NAME; --list lists the names"):
        experiments.main([])
    absent = arguments(place, "table5", f"--data_dir={tmp_path}")[1:]
    with pytest.raises(SystemExit, match="no prepared data set 'synthetic' in"):
        experiments.main([*absent, f"--output={tmp_path / 'out'}"])
    assert "started" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_and_starts_no_more(tmp_path, number):
    runs, place = planned(2), place_of(tmp_path)
    stop = f"import os, signal, time; os.kill(os.getppid(), {int(number)})"
    code = f"{stop}\ntime.sleep(60)"
    commands = {each.name: python(code) for each in runs}
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="the same command resumes"):
        processes.train_all(runs, commands, place, jobs=1)
    assert time.monotonic() - begin < 30
    assert not place.log(runs[1]).exists() and not place.failure(runs[0]).exists()


_STOPPED_TOGETHER = """
import os, pathlib, signal, sys, time

mine, other = map(pathlib.Path, sys.argv[1:])

def stop(number, frame):
    mine.with_suffix(".stopped").touch()
    while not other.with_suffix(".stopped").exists():
        time.sleep(0.05)
    print("together", flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, stop)
mine.touch()
while not other.exists():
    time.sleep(0.05)
if mine.name == "1":
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(300)
"""


def test_a_signal_reaches_all_runs_at_once(tmp_path, capsys):
    runs, place = planned(2), place_of(tmp_path)
    files = [str(tmp_path / name) for name in "01"]
    commands = {
        run.name: [*python(_STOPPED_TOGETHER), *order]
        for run, order in zip(runs, (files, files[::-1]), strict=True)
    }
    with pytest.raises(Interrupted):
        processes.train_all(runs, commands, place, jobs=2)
    assert [place.log(run).read_text() for run in runs] == ["together\n"] * 2
    said = capsys.readouterr().err
    assert said.count("stopping after its step, or after compiling") == 2


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """What programs have that this process starts: an environment, tiny networks."""
    for name, value in programs.ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nshift\nexec {sys.executable} -m tests.support.small_program "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.full
@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_every_experiment_runs_and_prints_its_table(place, environment, capsys, name):
    command = arguments(place, name, f"--only={ROWS[name]}", "--jobs=2")[1:]
    experiments.main([*command])
    table = (place / "out" / f"{name}.md").read_text()
    assert table in capsys.readouterr().out
    lines = [x for x in table.splitlines() if "| 4 |" in x and x.count("|") == 11]
    assert len(lines) == len(ROWS[name].split(","))
    for line in lines:
        assert line.endswith("|  |") and float(line.split("|")[3]) >= 0
    for suffix in ("csv", "png", "svg"):
        assert (place / "out" / f"{name}.{suffix}").stat().st_size
    experiments.main([*command])
    assert capsys.readouterr().err.count("finished already") == len(lines)


def test_runs_to_come_have_no_settings_that_nothing_reads(tmp_path):
    """Those that have begun keep theirs, which a run may not change."""
    flags = ("--config.model.drop_path=0.1", "--config.data.data_dir=absent")
    place = place_of(tmp_path, *flags)
    table = base.plan("table6", registry.EXPERIMENTS["table6"])
    configs = {run.name: place.configure(run) for run in table.runs}
    with pytest.raises(ValueError, match="^model.drop_path=0.1 does not act on"):
        experiments._check_runs(table, configs, place)
    for each in table.runs:
        (place.workdir(each) / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="absent"):
        experiments._check_runs(table, configs, place)


def test_a_finished_run_is_evaluated_as_published_once(tmp_path, capsys):
    """The result is read from its directory, and one of another checkpoint is not."""
    place = place_of(tmp_path, "--config.train.steps=20", "--config.eval.pad_to=32")
    trained = dataclasses.replace(place, folder=tmp_path / "made")
    run, other = planned(2)
    for made in (run, other):
        write_run(trained, made, [0.1, 0.3, 0.2, 0.25])
    code = "import shutil, sys; shutil.copytree(*sys.argv[1:])"
    commands = {
        each.name: [*python(code), trained.workdir(each), place.workdir(each)]
        for each in (run, other)
    }
    result = json.dumps({"scalars": {"miou": 0.4}, "step": 10, "pad_to": 0})
    write = f"import pathlib; pathlib.Path('eval_val_best.json').write_text({result!r})"
    go = f"import os, sys; os.chdir(sys.argv[1]); {write}"
    evaluations = {run.name: [*python(go), place.workdir(run)]}
    assert processes.train_all([run, other], commands, place, 1, evaluations) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].split(";")[0].split(",")[0] for line in said] == [
        *("started", "finished", "evaluation started", "evaluated"),
        *("started", "finished"),
    ]
    assert not is_due(run, place) and is_due(other, place)
    processes.train_all([run], commands, place, 1, evaluations)
    assert "finished already" in capsys.readouterr().err
    path = place.workdir(run) / "eval_val_best.json"
    path.write_text(result.replace("10", "20"))
    assert is_due(run, place)


@pytest.mark.full
def test_the_best_checkpoint_is_scored_without_padding(
    place, environment, monkeypatch, capsys, tmp_path
):
    row = Choice("Good", {"method": "supervised", "mpmc": "paper"})
    toy = dataclasses.replace(TOY, rows={"good": row})
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", toy)
    published = {"source": "Table 0", "columns": ["4"], "rows": {"good": [9.0]}}
    monkeypatch.setattr(base, "read_published", lambda name: published)
    more = ("--config.eval.pad_to=64", f"--output={tmp_path}")
    experiments.main([*arguments(place, "toy", *more)[1:]])
    captured = capsys.readouterr()
    assert "evaluation started" in captured.err
    (line,) = [x for x in captured.out.splitlines() if x.startswith("| Good | 4 |")]
    scored, difference = (float(line.split("|")[i]) for i in (5, 7))
    assert line.endswith("|  |") and round(scored - 9, 1) == difference
    (path,) = tmp_path.glob("runs/*/eval_val_best.json")
    found = json.loads(path.read_text())
    assert round(100 * found["scalars"]["miou"], 1) == scored
    assert found["pad_to"] == 0


@pytest.mark.full
def test_our_own_experiment_compares_pairs_of_runs(place, environment, capsys):
    rows = ("--only=off,labeled", "--jobs=2")
    command = arguments(place, "evidence2", *rows)[1:]
    experiments.main([*command])
    table = (place / "out" / "evidence2_synthetic.md").read_text()
    assert table in capsys.readouterr().out
    (pair,) = [x for x in table.splitlines() if x.startswith("| Does L_l^M help? |")]
    assert "| B: L_l^M alone | A: mean teacher | 1 |" in pair
    assert pair.endswith("| too few seeds |")
    assert (place / "out" / "README.md").exists()
    experiments.main([*command])
    assert capsys.readouterr().err.count("finished already") == 2


@pytest.mark.full
def test_one_that_is_killed_goes_on_and_finishes(place):
    more = ("--only=off,both", "--seeds=3", "--steps=6")
    command = arguments(place, "table6", *more, backbone="resnet18")
    process = start(*command)
    runs = base.plan(
        "table6",
        registry.EXPERIMENTS["table6"],
        dataset="synthetic",
        splits=["4"],
        seeds=[3],
        only=["off", "both"],
        changes={"backbone": "resnet18"},
    ).runs
    flags = [x for x in SMALL if x.startswith("--config.")]
    steps = ("--config.train.steps=6", f"--config.data.data_dir={place / 'data'}")
    out = place_of(place / "out", *steps, *flags)
    saved = out.workdir(runs[0]) / "checkpoints" / "2"
    deadline = time.monotonic() + 600
    while not saved.is_dir():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = run(*command)
    log = out.log(runs[0]).read_text()
    assert "resuming from step" in log and "FAILED" not in output
    for each in runs:
        assert read_outcome(each, out).state == "finished"


@pytest.mark.full
def test_a_planted_nan_costs_its_own_row_alone(
    place, environment, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", TOY)
    empty = {"source": "", "columns": [], "rows": {}}
    monkeypatch.setattr(base, "read_published", lambda name: empty)
    with pytest.raises(SystemExit, match="error: 1 run failed"):
        # In a folder of its own: a table has a run named as `good` is, of other length.
        more = ("--steps=4", f"--output={tmp_path}")
        experiments.main([*arguments(place, "toy", *more)[1:]])
    table = capsys.readouterr().out
    rows = {x.split("|")[1].strip(): x for x in table.splitlines() if "| 4 |" in x}
    assert rows["Good"].endswith("|  |") and rows["Better"].endswith("|  |")
    assert "1 run failed" in rows["Bad"]
    assert table.count("is not finite") == 1
