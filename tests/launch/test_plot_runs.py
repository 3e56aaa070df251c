"""Comparisons of runs: what they are by, and what they write over."""

import json
import os

import pytest

from launch import plot_runs


def test_compare_is_by_dice_where_volumes_are_scored(tmp_path, capsys):
    for name, partial in (("first", False), ("second", True)):
        run = tmp_path / name
        run.mkdir()
        lines = [
            {"step": step, "train/loss_supervised": 1.0, "val/miou": 0.9, "val/dice": x}
            for step, x in ((1, 0.0), (2, 0.4), (3, 0.3))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        manifest = {"data": {"partial": partial}, "resumed": []}
        (run / "manifest.json").write_text(json.dumps(manifest))
    runs = [str(tmp_path / name) for name in ("first", "second")]
    plot_runs.main([f"--output={tmp_path / 'out'}", *runs])
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "first val/dice (step)" in table and "| 0.4000 (2) | 0.3000 (3) | - |" in table
    )
    assert "On a partial data set: second" in table
    said = capsys.readouterr().out
    assert table in said and said.endswith(f"written to {tmp_path / 'out'}\n")
    plot_runs.main([f"--output={tmp_path / 'out'}", *runs])
    # The table, the curves in three formats, and two files of either run.
    again = f"written to {tmp_path / 'out'}; 8 files of an earlier call replaced\n"
    assert capsys.readouterr().out.endswith(again)


def test_a_comparison_does_not_write_over_the_runs_that_it_reads(tmp_path):
    """A run under way appends to the file that would be replaced."""
    run = tmp_path / "run"
    run.mkdir()
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 1, "train/loss_supervised": 1, "val/miou": 1}\n')
    manifest = {"data": {}, "resumed": []}
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = os.stat(metrics).st_ino
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / "link"):
        with pytest.raises(SystemExit, match=f"--output={output} holds the run {run}"):
            plot_runs.main([f"--output={output}", str(run)])
    # Nor over another run of the same name.
    other = tmp_path / "others" / "run"
    (other / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"{other} is a run of its own"):
        plot_runs.main([f"--output={other.parent}", str(run)])
    assert not (other / "metrics.jsonl").exists()
    assert os.stat(metrics).st_ino == before
    assert not (tmp_path / "table.md").exists()
