"""Curves with a table and copies of the runs: what is compared, what is written."""

import json
import os

import pytest

from mpmc_jax.analysis import registry, style


def _make_run(path, scores, *, partial=False):
    """A directory with the files of a run that has written `scores` by name."""
    path.mkdir()
    lines = [
        {"step": step, "train/loss_supervised": 1.0}
        | {name: values[step - 1] for name, values in scores.items()}
        for step in (1, 2, 3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    manifest = {"data": {"partial": partial}, "resumed": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _copy(runs, output):
    return registry.make("curves", runs, output, options={"copy_runs": 1})


def test_runs_are_compared_by_dice_where_volumes_are_scored(tmp_path):
    scores = {"val/miou": [0.9] * 3, "val/dice": [0.0, 0.4, 0.3]}
    runs = [
        _make_run(tmp_path / name, scores, partial=name == "second")
        for name in ("first", "second")
    ]
    paths = _copy(runs, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "first val/dice (step)" in table and "| 0.4000 (2) | 0.3000 (3) | - |" in table
    )
    assert "On a partial data set: second" in table
    copied = [
        f"{name}/{file}"
        for name in ("first", "second")
        for file in ("manifest.json", "metrics.jsonl")
    ]
    names = [*(f"curves.{kind}" for kind in ("png", "svg", "csv")), "table.md", *copied]
    assert paths == [tmp_path / "out" / name for name in names]
    copy = tmp_path / "out" / "second" / "metrics.jsonl"
    assert copy.read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    assert _copy(runs, tmp_path / "out") == paths


def test_copies_are_not_written_over_a_run(tmp_path):
    """A run under way appends to the file that would be replaced."""
    run = _make_run(tmp_path / "run", {"val/miou": [1.0] * 3})
    (run / "checkpoints").mkdir()
    before = os.stat(run / "metrics.jsonl").st_ino
    (tmp_path / "link").symlink_to(tmp_path)
    other = tmp_path / "others" / "run"
    (other / "checkpoints").mkdir(parents=True)
    for output in (tmp_path, tmp_path / "link", other.parent):
        with pytest.raises(ValueError, match=f"{output / 'run'} is a run"):
            _copy([run], output)
    assert not (other / "metrics.jsonl").exists()
    assert os.stat(run / "metrics.jsonl").st_ino == before
    assert not (tmp_path / "table.md").exists()
    # The curves alone may be beside it.
    assert len(registry.make("curves", [run], tmp_path)) == 3


def test_a_long_legend_leaves_the_panels_their_room():
    heights = {}
    for count in (2, 20):
        with style.applied():
            canvas, (axis,) = style.grid(1, 4.0, 3.0)
            for i in range(count):
                axis.plot([0, 1], label=f"{i} {'long name ' * 12}")
            style.legend_below(canvas, axis)
            canvas.draw_without_rendering()
        heights[count] = axis.get_position().height * canvas.get_figheight()
    assert heights[20] > 0.7 * heights[2]
