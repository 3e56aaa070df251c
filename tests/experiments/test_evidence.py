"""Our own experiments: which runs they share, and the summary of pairs of runs."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy import stats

from launch.experiments import __main__ as experiments
from mpmc_jax.analysis import evidence_page, paired
from mpmc_jax.experiments.paper import base, registry
from mpmc_jax.experiments.paper.base import Choice, Experiment, Pair
from mpmc_jax.pixels import RGB
from tests.support.planned import place_of

STEPS, SPEED = 20, 0.01
TOY = Experiment(
    "A comparison",
    "synthetic",
    {
        "off": Choice("Off", {"method": "supervised", "mpmc": "off"}),
        "on": Choice("On", {"method": "supervised", "mpmc": "paper"}),
        "late": Choice("Late", {"method": "supervised"}, {"optimizer.lag": 1}),
    },
    {"4": base.labeled_part("4")},
    pairs=(Pair("on", "off", "Does it help?"), Pair("late", "off", "And this?")),
    settings={
        "synthetic": {
            "train.steps": STEPS,
            "optimizer.lr": 0.5,
            "optimizer.lag": 0,
            "train.batch_size": 4,
        }
    },
)


BETTER = "better by more than 2 standard errors"


def difference(last):
    return paired.Difference(Pair("a", "b", "?"), "A", "B", last, last)


def planned(name, **how):
    return base.plan(name, registry.OWN[name], **how)


@pytest.fixture
def write(tmp_path):
    """Returns the function that writes a run's files, and the folder of all runs."""
    place = place_of(tmp_path, f"--config.train.steps={STEPS}")

    def write_run(run, scores, split=0):
        config = place.configure(run)
        directory = place.workdir(run)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config.to_dict()))
        data = {
            "dataset": "synthetic",
            "class_names": ["a", "b"],
            "palette": [[0, 0, 0], [1, 1, 1]],
            "pixels": dataclasses.asdict(RGB),
            "fingerprint": "0",
            "split_crc32": split,
            "unlabeled": 9,
        }
        manifest = {"steps_per_epoch": 7, "data": data}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        lines = []
        for step, score in zip((10, 20), scores, strict=False):
            lines.append({"step": step, "train/images_per_second": SPEED})
            lines.append({"step": step, "val/miou": score})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)

    return write_run, place


def test_a_difference_is_the_mean_of_pairs_and_its_error(write):
    write_run, place = write
    table = base.plan("toy", TOY, seeds=(0, 1, 2))
    runs = {cell.row: cell.runs for cell in table.cells}
    scores = {
        "off": [(0.5, 0.3), (0.1, 0.2), (0.2, 0.4)],
        "on": [(0.1, 0.4), (0.2, 0.32), (0.3, 0.49)],
        # One seed stops early, and one was not run.
        "late": [(0.2, 0.3), (0.2,)],
    }
    for row, of_seeds in scores.items():
        for run, own in zip(runs[row], of_seeds, strict=False):
            write_run(run, own)
    found = paired.summarize(table, place)
    on, late = found.differences
    np.testing.assert_allclose(on.last, [10, 12, 9])
    np.testing.assert_allclose(on.best, [-10, 12, 9])
    deviation = np.std([10, 12, 9], ddof=1)
    row = on.as_row()
    np.testing.assert_allclose(row["last_mean"], 31 / 3)
    np.testing.assert_allclose(row["last_error"], deviation / 3**0.5)
    assert (row["seeds"], row["verdict"]) == (3, BETTER)
    np.testing.assert_allclose(late.last, [0], atol=1e-9)
    assert late.verdict() == "too few seeds" and late.as_row()["last_error"] == ""
    np.testing.assert_allclose(found.deviation, deviation)
    # 20 steps of 4 images, three runs.
    np.testing.assert_allclose(found.scores[0].hours, 3 * 20 * 4 / SPEED / 3600)
    missing = "seed 1: step 10 of 20, seed 2: not run"
    assert [each.missing for each in found.scores] == ["", "", missing]
    text = found.markdown()
    least = f"{paired.detectable(deviation, 3):.1f} with 3 seeds"
    assert least in text.split("\n\n")[1]
    assert "| Does it help? | On | Off | 3 | +10.3 ± 0.9 | " in text
    assert f"| {stats.ttest_1samp([10, 12, 9], 0).pvalue:.2g} | {BETTER} |" in text
    assert found.drawing().png[:4] == b"\x89PNG"


def test_an_arm_that_collapses_does_not_hide_what_others_could_show():
    lasts = (-60.0, 0.0, 40.0), (0.0, 0.5, 1.0), (1.0, 2.0, 3.0)
    differences = tuple(map(difference, lasts))
    table = base.plan("toy", TOY)
    found = paired.PairedSummary(table, (), differences, {})
    assert found.deviation == 1.0


@pytest.mark.parametrize(
    "last, verdict",
    [
        ((1.0, 2.0, 1.5), BETTER),
        ((-1.0, -2.0, -1.5), "worse by more than 2 standard errors"),
        ((1.0, -2.0, 3.0), "within 2 standard errors"),
        ((5.0, 5.1), "too few seeds"),
        ((), "too few seeds"),
    ],
)
def test_a_verdict_compares_with_two_standard_errors(last, verdict):
    assert difference(last).verdict() == verdict


def test_p_values_are_those_of_a_paired_t_test():
    for last in ((1.0, 2.0, 1.5), (-3.0, 1.0, -2.0, -1.0), (4.0, 5.0)):
        expected = stats.ttest_1samp(last, 0).pvalue
        np.testing.assert_allclose(difference(last).p_value(), expected)
        assert difference(last).as_row()["p"] == difference(last).p_value()
    for unknown in ((), (5.0,), (0.0, 0.0, 0.0)):
        assert difference(unknown).as_row()["p"] == ""


@pytest.mark.parametrize("seeds", [3, 5, 30, 100])
def test_power_is_that_of_repeated_experiments(seeds):
    """Of simulated experiments, a t-test finds the difference in four of five."""
    rng = np.random.default_rng(0)
    truth = paired.detectable(1.5, seeds)
    found = rng.normal(truth, 1.5, (4000, seeds))
    p = stats.ttest_1samp(found, 0, axis=1).pvalue
    np.testing.assert_allclose((p < 0.05).mean(), 0.8, atol=0.03)


@pytest.mark.parametrize("seeds", [3, 5])
def test_chance_alone_exceeds_two_standard_errors_as_the_page_says(seeds):
    found = np.random.default_rng(0).normal(0, 1.5, (4000, seeds))
    verdicts = [difference(tuple(last)).verdict() for last in found]
    share = 1 - verdicts.count("within 2 standard errors") / 4000
    np.testing.assert_allclose(share, paired.by_chance(seeds), atol=0.02)
    assert "18% of cases with 3 seeds" in paired.CHANCE


def test_runs_of_other_labeled_images_are_no_pair(write):
    write_run, place = write
    on, off = (base.plan("toy", TOY, seeds=(0, 1)).cells[i].runs for i in (1, 0))
    for seed, split in ((0, 0), (1, 7)):
        write_run(off[seed], (0.1, 0.2))
        write_run(on[seed], (0.1, 0.3), split)
    found = paired.summarize(base.plan("toy", TOY, seeds=(0, 1)), place)
    assert (found.differences[0].last, found.differences[0].left_out) == ((10.0,), 1)


def test_rounding_errors_are_no_difference(write):
    write_run, place = write
    table = base.plan("toy", TOY, seeds=(0, 1, 2))
    runs = {cell.row: cell.runs for cell in table.cells}
    for seed, score in enumerate((0.1, 0.3, 0.7)):
        write_run(runs["off"][seed], (0.1, score))
        write_run(runs["on"][seed], (0.1, np.nextafter(score, 1)))
    on = paired.summarize(table, place).differences[0]
    assert on.verdict() == "within 2 standard errors" and on.as_row()["p"] == ""


def test_a_score_that_is_not_finite_is_left_out_and_counted(write):
    write_run, place = write
    table = base.plan("toy", TOY, seeds=(0, 1, 2))
    runs = {cell.row: cell.runs for cell in table.cells}
    for run in runs["off"]:
        write_run(run, (0.1, 0.2))
    for run, last in zip(runs["on"], (0.3, None, 0.5), strict=True):
        write_run(run, (0.1, last))
    found = paired.summarize(table, place)
    on = found.differences[0]
    np.testing.assert_allclose(on.last, [10, 30])
    assert (on.left_out, on.verdict()) == (1, "too few seeds")
    text = found.markdown()
    assert "| On | Off | 2 (1 left out) | +20.0 ± 10.0 |" in text
    np.testing.assert_allclose(found.scores[1].last, [30, 50])
    assert found.scores[1].missing == "seed 1: no finite score"


def test_settings_are_those_of_the_runs(write):
    write_run, place = write
    table = base.plan("toy", TOY)
    text = paired.summarize(table, place).markdown()
    assert "Settings" not in text
    for run in table.runs:
        write_run(run, (0.1, 0.2))
    # How often a run is evaluated may differ from the plan.
    text = paired.summarize(table, place).markdown()
    common = f"`train.steps={STEPS}`, `optimizer.lr=0.5`, `train.batch_size=4`"
    assert f"Settings of all runs: {common}." in text
    assert "- `optimizer.lag`: 1 in Late (1 run); 0 in the others" in text


def test_no_other_readme_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Results\n")
    place = place_of(tmp_path)
    arguments = ["--name=evidence1", f"--output={tmp_path}"]
    for more in ([], ["--summarize"]):
        with pytest.raises(SystemExit, match="README.md is not a page of this exper"):
            experiments.main([*arguments, *more])
    assert path.read_text() == "# Results\n" and [*tmp_path.iterdir()] == [path]
    path.write_text(evidence_page.page(place))
    evidence_page.write(place)


def test_nothing_run_is_said_to_show_nothing(tmp_path):
    found = paired.summarize(base.plan("toy", TOY), place_of(tmp_path))
    assert "not known" in found.markdown()
    assert {each.verdict() for each in found.differences} == {"too few seeds"}
    assert found.drawing().rows[0]["last_mean"] == ""


def test_the_page_has_every_run_that_is_there_whatever_it_shows(write):
    write_run, place = write
    table = planned("evidence2", dataset="camvid", seeds=(0, 1, 2))
    runs = {cell.row: cell.runs for cell in table.cells}
    for row, last in (
        ("off", (0.3, 0.4, 0.5)),
        ("labeled", (0.2, 0.31, 0.4)),
        ("paper", (0.5,)),
    ):
        for run, score in zip(runs[row], last, strict=False):
            write_run(run, (0.1, score))
    (place.folder / "evidence0.md").write_text("# Stage 0\n\ntext\n")
    (place.folder / "other").mkdir()
    (place.folder / "other" / "README.md").write_text("# Tried first\n\ntext\n")
    links = "[a](../../b/c.md) [d](https://e.org/f) [g](h.png)"
    (place.folder / "other" / "evidence0.md").write_text(f"# Other\n\n{links}\n")
    text = evidence_page.page(place)
    assert "[a](../b/c.md) [d](https://e.org/f) [g](other/h.png)" in text
    assert "Runs with other settings:\n\n- [Tried first](other/README.md)\n" in text
    for long in text.splitlines():
        assert len(long) <= 88 or long.startswith("|"), long
    # Lines are joined, to be compared whatever their breaks.
    text = re.sub(r"\n  (?=\S)|(?<!\n)\n(?=[^\s|#`-])", " ", text)
    worse = text.index("Worse by more than 2 standard errors:")
    few = text.index("Too few seeds:")
    line = "Does L_l^M help? B: L_l^M alone minus A: mean teacher: -9.7"
    assert (
        worse < text.index(f"- camvid, stage 2: {line} ± 0.3 (3 seeds: -10.0, ") < few
    )
    p = stats.ttest_1samp([-10, -9, -10], 0).pvalue
    said = f"smallest p of these 1 pair is {p:.2g}, and {p:.2g} if corrected"
    assert said in text[:worse]
    assert "+20.0 (1 seed)" in text[few:]
    # Mean teacher reads as many unlabeled images as labeled ones.
    hours = 7 * STEPS * (8 + 8) / SPEED / 3600
    assert f"Costs: {hours:.1f} hours of training in 7 runs" in text
    # Of labeled - off and paper - off.
    assert "Of 2 trainings with a form of MPMC, compared with the same without:" in text
    counted = (0, BETTER), (1, BETTER.replace("better", "worse"))
    counted += (0, "within 2 standard errors"), (1, "too few seeds")
    assert ", ".join(f"{count} {verdict}" for count, verdict in counted) in text
    unmeasured = text[text.index("Not measured") :]
    assert "- camvid, stage 2: detached - off, " in unmeasured
    assert "paper - off" not in unmeasured.split("- acdc, stage 2: ")[0]
    assert "\n## Stage 0\n" in text and "## evidence2 on camvid" in text
    # Stage 1 shares the run without MPMC, and is there with it.
    assert "## evidence1 on camvid" in text and "evidence1 on acdc" not in text


def test_settings_of_an_experiment_give_way_to_the_command_line(capsys, tmp_path):
    table = base.plan("toy", TOY)
    flags = table.runs[2].flags(["--config.optimizer.lr=0.25"])
    config = experiments._configuration(flags)
    assert (config.train.steps, config.optimizer.lr) == (STEPS, 0.25)
    assert config.optimizer.lag == 1
    assert "lr" not in table.runs[2].name
    experiments.main(["--name=evidence2", "--summarize", f"--output={tmp_path}"])
    assert "no training with MPMC has been run" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "evidence2_acdc.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="one labeled part; --splits names 2"):
        both = ["--dataset=camvid", "--splits=1_8,1_4"]
        experiments.main(
            ["--name=evidence1", "--summarize", f"--output={tmp_path}", *both]
        )


def test_another_data_set_has_the_labeled_part_of_its_own_settings():
    [column] = planned("evidence1", dataset="camvid").columns
    assert column == "1_16"
    [column] = planned("evidence1", dataset="synthetic").columns
    assert column == "1_8"


def test_pairs_name_rows_and_stages_share_runs():
    names = {}
    for name, experiment in registry.OWN.items():
        for pair in experiment.pairs:
            assert {pair.row, pair.against} <= set(experiment.rows)
        for run in planned(name).runs:
            config = experiments._configuration(run.flags()).to_dict()
            assert names.setdefault(run.name, config) == config
    shared = {run.name for run in planned("evidence1").runs}
    assert sum(run.name in shared for run in planned("evidence2").runs) == 4
    assert sum(run.name in shared for run in planned("evidence3").runs) == 2


def test_forms_of_mpmc_are_compared_with_the_same_training_without():
    stage2 = registry.OWN["evidence2"]
    alone = {
        (pair.row, pair.against)
        for pair in stage2.pairs
        if evidence_page._adds_mpmc(stage2, pair)
    }
    assert {("labeled", "off"), ("balanced_logit", "balanced_off")} <= alone
    others = ("max", "shuffled"), ("logit", "supervised"), ("logit", "mean_teacher")
    assert not alone & {*others, ("balanced_off", "off"), ("balanced_logit", "off")}


def test_arms_differ_from_their_pairs_as_they_say():
    rows = registry.OWN["evidence2"].rows
    changed = {
        (pair.row, pair.against): {
            key
            for key in {*rows[pair.row].settings, *rows[pair.against].settings}
            if rows[pair.row].settings.get(key) != rows[pair.against].settings.get(key)
        }
        for pair in registry.OWN["evidence2"].pairs
    }
    assert rows["detached"].settings == rows["labeled"].settings | {
        "mpmc.detach": "all"
    }
    assert changed["max", "shuffled"] == {"mpmc.shuffle"}
    assert changed["logit", "logit_shuffled"] == {"mpmc.shuffle"}
    assert changed["logit_detached", "logit"] == {"mpmc.detach"}
    assert changed["max", "labeled"] == {"mpmc.lambda_s", "mpmc.lambda_scale"}
    assert changed["balanced_off", "off"] == {"method.unlabeled_loss"}
    assert changed["paper", "off"] == set()
    assert rows["off"].argument["mpmc"] == "off"
