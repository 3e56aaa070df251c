"""The commands evaluate and predict on a run that needs no training, and pictures."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import base
from launch import compare as launch_compare
from launch import evaluate as launch_evaluate
from launch import predict as launch_predict
from mpmc_jax.data.info import DatasetFacts
from mpmc_jax.evaluation import metrics, pictures
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Prediction
from tests.toy_source import Example, Source

NAMES = ("dark", "bright")
PALETTE = ((10, 20, 30), (200, 100, 50))


class _Threshold(nn.Module):
    """Class 1 where the image is brighter than its middle."""

    @nn.compact
    def __call__(self, images):
        bias = self.param("bias", nn.initializers.zeros, ())
        brightness = images.mean(-1) + bias
        return Prediction(logits=jnp.stack([-brightness, brightness], -1))


def _picture(seed, size=(12, 16)):
    bright = np.random.default_rng(seed).random(size) < 0.4
    return bright, np.where(bright, 230, 20)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.fixture
def run(monkeypatch):
    module = _Threshold()
    config = base.get_base()
    config.eval.batch_size, config.eval.pad_to = 2, 8
    run = types.SimpleNamespace(
        config=config,
        facts=DatasetFacts("toy", NAMES, PALETTE, RGB, fingerprint="0"),
        module=module,
        variables=module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))),
        step=7,
        network_name="teacher",
        probe=None,
        manifest={"seed": 0},
    )
    opened = []

    def open_run(workdir, checkpoint="best"):
        opened.append(checkpoint)
        return run

    monkeypatch.setattr(launch_evaluate.runs, "open_run", open_run)
    run.opened = opened
    return run


def test_evaluate_prints_a_table_and_writes_the_figures(
    run, monkeypatch, tmp_path, capsys
):
    source = Source()
    for seed in range(3):
        bright, image = _picture(seed)
        label = bright.astype(np.uint8)
        label[0] = 1
        source.append(Example(str(seed), image, label))
    monkeypatch.setattr(launch_evaluate.runs, "open_split", lambda *_: source)
    launch_evaluate.main(
        [f"--workdir={tmp_path}", "--checkpoint=7", "--split=test", "--pad_to=8"]
    )
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "eval_test_7.json").read_text())
    assert run.opened == ["7"]
    confusion = np.array(written["confusion"])
    assert confusion.sum() == 3 * 12 * 16
    assert confusion[0, 1] == 0
    assert confusion[1, 0] > 0
    assert written["scalars"]["miou"] == pytest.approx(metrics.mean_iou(confusion))
    assert (written["step"], written["network"], written["pad_to"]) == (7, "teacher", 8)
    assert written["manifest"]["versions"]["jax"] == jax.__version__
    assert "padded to 8" in printed
    assert "test, teacher of step 7" in printed
    assert f"{100 * metrics.iou(confusion)[1]:.2f}" in printed


def test_evaluate_says_that_the_data_set_is_partial(run, monkeypatch, tmp_path, capsys):
    bright, image = _picture(0)
    source = Source([Example("0", image, bright.astype(np.uint8))])
    monkeypatch.setattr(launch_evaluate.runs, "open_split", lambda *_: source)
    for partial in (False, True):
        run.facts = dataclasses.replace(run.facts, partial=partial)
        launch_evaluate.main([f"--workdir={tmp_path}"])
        assert ("partial data set" in capsys.readouterr().out) == partial
        written = json.loads((tmp_path / "eval_val_best.json").read_text())
        assert written["partial"] is partial
        assert written["manifest"]["data"]["partial"] is partial


def test_evaluate_reports_a_user_error_in_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(launch_evaluate.runs, "open_split", lambda *_: Source())
    with pytest.raises(SystemExit, match="error: nothing to evaluate"):
        launch_evaluate.main([f"--workdir={tmp_path}"])


def test_predict_writes_three_pictures_an_image(run, tmp_path):
    (tmp_path / "in").mkdir()
    for seed, suffix in enumerate(("png", "BMP")):
        Image.fromarray(_picture(seed)[1]).save(tmp_path / "in" / f"{seed}.{suffix}")
    Image.fromarray(_picture(2)[1][..., 0]).save(tmp_path / "in" / "grey.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    output = tmp_path / "new" / "out"
    launch_predict.main(
        ["--workdir=run", f"--input={tmp_path / 'in'}", f"--output={output}"]
    )
    for stem, seed in (("0", 0), ("1", 1), ("grey", 2)):
        bright, image = _picture(seed)
        index = Image.open(output / f"{stem}_index.png")
        assert index.mode == "P"
        np.testing.assert_array_equal(np.asarray(index), bright)
        color = np.asarray(Image.open(output / f"{stem}_color.png"))
        np.testing.assert_array_equal(color, np.asarray(index.convert("RGB")))
        np.testing.assert_array_equal(color, np.array(PALETTE)[bright.astype(int)])
        mixed = np.asarray(Image.open(output / f"{stem}_overlay.png"))
        np.testing.assert_allclose(mixed, (image / 2 + color / 2), atol=0.5)
    assert len(list(output.iterdir())) == 9


def test_predict_names_the_unreadable_and_does_the_rest(run, tmp_path):
    good, cut, text = (tmp_path / name for name in ("a.png", "b.png", "c.jpg"))
    Image.fromarray(_picture(0)[1]).save(good)
    cut.write_bytes(good.read_bytes()[:60])
    text.write_text("hello")
    with pytest.raises(SystemExit) as stopped:
        launch_predict.main(
            [
                "--workdir=run",
                f"--input={good},{cut},{text}",
                f"--output={tmp_path / 'out'}",
            ]
        )
    message = stopped.value.code
    assert isinstance(message, str)
    assert [str(cut) in message, str(text) in message] == [True, True]
    assert str(good) not in message
    assert (tmp_path / "out" / "a_index.png").is_file()
    assert not (tmp_path / "out" / "b_index.png").exists()


def test_predict_refuses_what_it_could_not_name(run, tmp_path):
    for name in ("x.png", "x.bmp"):
        Image.fromarray(_picture(0)[1]).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"x\.bmp.*x\.png"):
        launch_predict.find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="absent"):
        launch_predict.find_images([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image"):
        launch_predict.find_images([str(tmp_path / "empty")])


def test_table_marks_absent_classes_and_compares_with_the_constant():
    histogram = np.zeros((2, 2, metrics.BINS), int)
    histogram[0, :, 10], histogram[1, 0, -10] = 30, 10
    result = EvalResult(
        confusion=np.array([[4, 0], [0, 0]]),
        num_images=2,
        pad_to=0,
        seconds=1.0,
        programs=1,
        histogram=histogram,
    )
    lines = format_table(result, NAMES).splitlines()
    assert lines[1].split() == ["dark", "100.00", "100.00", "4"]
    assert lines[2].split() == ["bright", "-", "-", "0"]
    assert "average precision: 100.00 (best constant prediction 25.00)" in lines[5]
    assert "Hamming accuracy: 100.00 (best constant prediction 87.50)" in lines[6]
    assert "own size" in lines[7]


def test_void_and_unknown_indices_are_black():
    index = np.array([[0, 1, 2, 255]], np.uint8)
    expected = [[*PALETTE, (0, 0, 0), (0, 0, 0)]]
    np.testing.assert_array_equal(pictures.colorize(index, PALETTE), expected)


def test_panel_sets_pictures_where_they_belong():
    red, blue = (np.full((10, 12, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    grey = np.full((10, 12, 1), 77, np.uint8)
    picture = np.asarray(pictures.panel([[red, grey], [blue, red]], ["one", "two"]))
    assert (picture[16:26, 4:16] == red).all()
    assert (picture[16:26, 20:32] == 77).all()
    assert (picture[30:40, 4:16] == blue).all()
    assert (picture[:16] < 128).any()
    with pytest.raises(ValueError, match="2 a row"):
        pictures.panel([[red, grey], [blue]], ["one", "two"])


def test_heat_map_spans_black_to_white():
    np.testing.assert_array_equal(
        pictures.heat_map(np.array([[0.1, 0.3], [0.2, 0.1]]))[..., 0],
        [[0, 255], [128, 0]],
    )
    assert pictures.heat_map(np.full((2, 2), 0.5)).max() == 0


def test_compare_is_by_dice_where_volumes_are_scored(tmp_path, capsys):
    for name, partial in (("first", False), ("second", True)):
        run = tmp_path / name
        run.mkdir()
        lines = [
            {"step": step, "train/loss_supervised": 1.0, "val/miou": 0.9, "val/dice": x}
            for step, x in ((1, 0.0), (2, 0.4), (3, 0.3))
        ]
        text = "\n".join(map(json.dumps, lines))
        (run / "metrics.jsonl").write_text(text)
        (run / "manifest.json").write_text(json.dumps({"data": {"partial": partial}}))
    runs = [str(tmp_path / name) for name in ("first", "second")]
    launch_compare.main([f"--output={tmp_path / 'out'}", *runs])
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "first val/dice (step)" in table and "| 0.4000 (2) | 0.3000 (3) | - |" in table
    )
    assert "On a partial data set: second" in table
    assert table in capsys.readouterr().out
