"""A figure is one file and one line of the registry."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from launch.experiments import __main__ as experiments
from mpmc_jax.analysis import registry
from mpmc_jax.analysis.base import Drawing, Figure, by_name, drawing_of
from mpmc_jax.training.metric_writer import read_metrics


@dataclasses.dataclass(frozen=True)
class Longest(Figure):
    """Bars of the largest step that each run has written, times `factor`."""

    factor: float = 1.0

    def draw(self, runs) -> Drawing:
        rows = [
            {
                "run": name,
                "steps": self.factor
                * max(
                    line["step"] for line in read_metrics(run.workdir / "metrics.jsonl")
                ),
            }
            for name, run in by_name(runs).items()
        ]
        canvas = Canvas(figsize=(3, 2))
        canvas.subplots().bar(*zip(*(row.values() for row in rows), strict=True))
        return drawing_of(canvas, rows)


@pytest.fixture
def runs(tmp_path):
    """Two directories with metrics; the second has trained longer."""
    for name, steps in (("a", 2), ("b", 3)):
        lines = [
            {"step": step, "train/loss_supervised": 1 / step, "val/miou": step / 10}
            for step in range(1, steps + 1)
        ]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return [str(tmp_path / name) for name in "ab"]


def _rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_one_file_and_one_line_add_a_figure(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.FIGURES, "toy", Longest)
    experiments.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in listed[-len(registry.FIGURES) :]] == [
        *registry.FIGURES
    ]
    assert "Bars of the largest step" in listed[-1] and "factor=1.0" in listed[-1]
    output = tmp_path / "by_command"
    command = ["--name=toy", f"--output={output}", "--options=factor=2", *runs]
    experiments.main(command)
    files = [output / f"toy.{kind}" for kind in ("png", "svg", "csv")]
    assert capsys.readouterr().out == f"written: {', '.join(map(str, files))}\n"
    with Image.open(files[0]) as picture:
        assert picture.width > 100
    assert b"<svg" in files[1].read_bytes()
    assert _rows(files[2]) == [
        {"run": "a", "steps": "4.0"},
        {"run": "b", "steps": "6.0"},
    ]
    # From Python the same files are written, byte for byte.
    again = registry.make("toy", runs, tmp_path / "python", options={"factor": 2.0})
    assert [path.read_bytes() for path in again] == [
        path.read_bytes() for path in files
    ]


def test_curves_have_the_numbers_of_the_runs(runs, tmp_path):
    *_, table = registry.make("curves", runs, tmp_path / "out")
    points = [
        (row["run"], int(row["step"]), float(row["value"]))
        for row in _rows(table)
        if row["name"] == "val/miou"
    ]
    assert points == [
        ("a", 1, 0.1),
        ("a", 2, 0.2),
        ("b", 1, 0.1),
        ("b", 2, 0.2),
        ("b", 3, 0.3),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=figure9"], "unknown figure 'figure9'; one of curves, panels"),
        (
            ["--name=panels", "--options=size=3"],
            "figure panels has no option 'size'; valid: images",
        ),
        (["--name=panels", "--options=images=a"], "images=a is not of type int"),
        (["--name=panels", "--options=images"], "'images' is not KEY=VALUE"),
        (["--name=panels", "--options=images=0"], "images=0: at least 1 is needed"),
        (["--name=panels"], "panels show one run; 2 are given"),
        (["--name=curves", "--options=loss=x"], "no run has written 'x'"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        experiments.main([*arguments, f"--output={tmp_path / 'out'}", *runs])
    error = str(stopped.value.code)
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="two runs have the same name"):
        registry.make("curves", [runs[0], runs[0]], tmp_path)


def test_options_of_every_figure_are_numbers_or_texts():
    """`build_figure` reads them from text by the type of their default."""
    for name, figure in registry.FIGURES.items():
        for field in dataclasses.fields(figure):
            assert type(field.default) in (int, float, str), f"{name}: {field.name}"
        built = registry.build_figure(name, {})
        assert isinstance(built, Figure)
        assert dataclasses.asdict(built) == registry.base.default_options(figure)
    np.testing.assert_equal(registry.build_figure("panels", {"images": "2"}).images, 2)
