"""The warning that pseudo-labels lost a class, and the shares in metrics.jsonl."""

import logging
from pathlib import Path

import numpy as np
import pytest

from mpmc_jax.training import metric_writer
from mpmc_jax.training.class_watch import ClassWatch
from tests.support.programs import read_metrics

NAMES = ("background", "leaf", "stem")
LABEL = np.array([0.9, 0.06, 0.04])
NOTHING = np.full(3, np.nan)


def warnings(
    caplog, pseudo, *, steps=300, start=0, rampup=0, label=LABEL, confident=0.26
):
    """Warnings of a run whose pseudo-labels at step t have the shares pseudo(t)."""
    watch = ClassWatch(NAMES, start, steps, rampup)
    with caplog.at_level(logging.WARNING):
        for step in range(start, steps):
            shares = {"label": label, "pseudo": np.asarray(pseudo(step), float)}
            watch.add(shares, confident)
    return [record.getMessage() for record in caplog.records]


def test_a_class_that_is_gone_is_named_once(caplog):
    def pseudo(step):
        # The stem goes at step 60, the leaf at 150; both are hardly there before.
        return [0.9, 0.06 * (step < 150), 0.004 * (step < 60)]

    first, second = warnings(caplog, pseudo)
    assert (
        first.startswith("steps 61 to 90: ")
        and "stem (0.04 of the labels, 0 of these)" in first
    )
    assert "leaf" not in first and "background" not in first
    assert (
        second.startswith("steps 151 to 180: ")
        and "leaf (0.06 of the labels, 0 of these)" in second
    )
    assert "stem" not in second and "--config.method.rampup=-1" in second


@pytest.mark.parametrize(
    ("pseudo", "changes"),
    [
        # In the first tenth only the background is confident.
        (lambda step: [1, 0, 0] if step < 30 else LABEL, {}),
        # So it may be until the ramp-up is over.
        (lambda step: [1, 0, 0] if step < 90 else LABEL, {"rampup": 80}),
        # The first confident pixels of a run are those of the easiest classes.
        (lambda step: [1, 0, 0], {"confident": 0.24}),
        # Nothing confident is no class gone.
        (lambda step: NOTHING, {}),
        # Of the labels' share a fiftieth is left.
        (lambda step: [1, 0.06 / 50, 0.04 / 50], {}),
        # Now and then a few batches lack a class.
        (lambda step: LABEL if step % 20 == 0 else [1, 0, 0], {}),
        # A class that the labels lack is not missed.
        (lambda step: [0.9, 0.1, 0], {"label": np.array([0.9, 0.1, 0])}),
        # A window that began before this part of the run is not whole.
        (lambda step: [1, 0, 0] if step < 90 else LABEL, {"start": 65}),
        # Short runs have windows of ten steps, of which the first says nothing.
        (lambda step: [1, 0, 0], {"steps": 19}),
    ],
)
def test_no_warning(caplog, pseudo, changes):
    assert warnings(caplog, pseudo, **changes) == []


def test_supervision_alone_has_no_pseudo_labels_to_miss(caplog):
    watch = ClassWatch(NAMES, 0, 100)
    for _ in range(100):
        watch.add({"label": LABEL}, 0.0)
    assert not caplog.records


def test_shares_are_written_by_class_and_left_out_where_nothing_counts(tmp_path):
    made = metric_writer.MetricWriter(tmp_path, 0, 10, images=4, classes=NAMES)
    values = {"loss": 1.0, "lr": 0.1}
    made.add(values, {"label": LABEL, "pseudo": NOTHING})
    made.flush(1)
    made.add(values, {"label": LABEL, "pseudo": NOTHING})
    made.add(values, {"label": 1 - LABEL, "pseudo": np.array([1.0, 0.0, 0.0])})
    made.flush(3)
    made.close()
    first, second = read_metrics(tmp_path)
    shares = {k: v for k, v in first.items() if "share" in k}
    assert shares == {
        f"train/share/label/{name}": pytest.approx(share)
        for name, share in zip(NAMES, LABEL, strict=True)
    }
    assert second["train/share/label/leaf"] == pytest.approx(0.5)
    assert second["train/share/pseudo/background"] == 1
    assert second["train/share/pseudo/leaf"] == 0


def test_a_run_that_unlearned_its_foreground_is_reported_early(caplog):
    """A mean teacher on ACDC that was stopped; its lines are means of ten steps."""
    lines = read_metrics(Path("results/mean_teacher_acdc/old_0"))
    lines = [line for line in lines if "train/confident" in line]
    classes = ("background", "right ventricle", "myocardium", "left ventricle")
    watch = ClassWatch(classes, 0, 300)
    for line in lines[:6]:
        shares = {
            kind: [line.get(f"train/share/{kind}/{each}", 0) for each in classes]
            for kind in ("label", "pseudo")
        }
        for _ in range(10):
            watch.add(shares, line["train/confident"])
    (record,) = caplog.records
    assert "steps 31 to 60" in record.getMessage()
    assert all(each in record.getMessage() for each in classes[1:])
