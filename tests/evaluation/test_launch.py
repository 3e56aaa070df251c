"""The commands evaluate and predict on a run that needs no training, and pictures."""

import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from launch import evaluate as launch_evaluate
from launch import predict as launch_predict
from mpmc_jax import atomic_write
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.evaluation import metrics, prediction_files
from mpmc_jax.experiments import predict
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.predict_inputs import find_images
from tests.support.bright_run import bright_run
from tests.support.data_sets import prepare_synthetic
from tests.support.toy_dataset import Dataset, Example

NAMES = ("dark", "bright")
PALETTE = ((10, 20, 30), (200, 100, 50))


def _picture(seed, size=(12, 16)):
    bright = np.random.default_rng(seed).random(size) < 0.4
    return bright, np.where(bright, 230, 20)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.fixture
def run(monkeypatch):
    named = {"step": 7, "network_name": "teacher", "manifest": {"seed": 0}}
    run = bright_run(NAMES, PALETTE, **named)
    run.config.eval.batch_size, run.config.eval.pad_to = 2, 8
    monkeypatch.setattr(runs, "load_run", lambda workdir, checkpoint="best": run)
    return run


def test_evaluate_prints_a_table_and_writes_the_figures(
    run, monkeypatch, tmp_path, capsys
):
    dataset = Dataset()
    for seed in range(3):
        bright, image = _picture(seed)
        label = bright.astype(np.uint8)
        label[0] = 1
        dataset.append(Example(str(seed), image, label))
    monkeypatch.setattr(runs, "open_split", lambda *_: dataset)
    opened = []

    def load_run(workdir, checkpoint):
        opened.append(checkpoint)
        return run

    monkeypatch.setattr(runs, "load_run", load_run)
    launch_evaluate.main(
        [f"--workdir={tmp_path}", "--checkpoint=7", "--split=test", "--pad_to=8"]
    )
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "eval_test_7_pad_to_8.json").read_text())
    assert opened == ["7"]
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
    dataset = Dataset([Example("0", image, bright.astype(np.uint8))])
    monkeypatch.setattr(runs, "open_split", lambda *_: dataset)
    for partial in (False, True):
        facts = dataclasses.replace(run.facts, partial=partial)
        opened = dataclasses.replace(run, facts=facts)
        monkeypatch.setattr(runs, "load_run", lambda *_, opened=opened: opened)
        launch_evaluate.main([f"--workdir={tmp_path}"])
        assert ("partial data set" in capsys.readouterr().out) == partial
        written = json.loads((tmp_path / "eval_val_best.json").read_text())
        assert written["partial"] is partial
        assert written["manifest"]["data"]["partial"] is partial


def test_evaluate_reports_a_user_error_in_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "open_split", lambda *_: Dataset())
    with pytest.raises(SystemExit, match="error: nothing to evaluate"):
        launch_evaluate.main([f"--workdir={tmp_path}"])


def test_predict_writes_three_pictures_an_image(run, tmp_path):
    (tmp_path / "in").mkdir()
    for seed, suffix in enumerate(("png", "BMP")):
        Image.fromarray(_picture(seed)[1]).save(tmp_path / "in" / f"{seed}.{suffix}")
    Image.fromarray(_picture(2)[1][..., 0]).save(tmp_path / "in" / "gray.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    output = tmp_path / "new" / "out"
    launch_predict.main(
        ["--workdir=run", f"--input={tmp_path / 'in'}", f"--output={output}"]
    )
    for stem, seed in (("0", 0), ("1", 1), ("gray", 2)):
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
        find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="absent"):
        find_images([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image"):
        find_images([str(tmp_path / "empty")])


def _predict(*arguments):
    launch_predict.main(["--workdir=run", *map(str, arguments)])


def _files(folder):
    """Path below the folder -> content, of every file at any depth."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_predict_keeps_subfolders_and_tells_what_it_leaves_out(run, tmp_path, capsys):
    (tmp_path / "in" / "day2").mkdir(parents=True)
    image = Image.fromarray(_picture(0)[1])
    image.save(tmp_path / "in" / "a.png")
    image.save(tmp_path / "in" / "day2" / "a.png")
    image.save(tmp_path / "in" / "c.jfif", "JPEG")
    for name in ("notes.txt", "more.txt", ".hidden.png"):
        (tmp_path / "in" / name).write_text("no image")
    _predict(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    said = capsys.readouterr().out
    assert set(_files(tmp_path / "out")) == {
        f"{stem}_{kind}.png"
        for stem in ("a", "day2/a", "c")
        for kind in ("index", "color", "overlay")
    }
    assert "not read: 2 .txt (more.txt, notes.txt); 1 hidden (.hidden.png)" in said
    assert f"3 of 3 images written to {tmp_path / 'out'}" in said


@pytest.mark.parametrize("below", ["", "predictions"])
def test_predict_does_not_read_its_own_pictures(run, tmp_path, capsys, below):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(_picture(0)[1]).save(folder / "a.png")
    command = (f"--input={folder}", f"--output={folder / below}")
    _predict(*command)
    first = _files(folder)
    assert len(first) == 4
    capsys.readouterr()
    _predict(*command)
    said = capsys.readouterr().out
    assert "not read: 3 files of an earlier prediction" in said
    assert f"0 of 1 image written to {folder / below}, 1 already there" in said
    assert "(--overwrite replaces them)" in said
    _predict(*command, "--overwrite")
    assert "1 of 1 image written" in capsys.readouterr().out
    assert _files(folder) == first


def test_predict_overwrites_no_file_of_others(run, tmp_path, capsys):
    """By name, hard link or symbolic link: an image that is read stays as it is."""
    folder, output = tmp_path / "in", tmp_path / "out"
    for each in (folder, output):
        each.mkdir()
    for number, name in enumerate(("a", "a_color", "b", "c", "d")):
        Image.fromarray(_picture(number)[1]).save(folder / f"{name}.png")
    os.link(folder / "b.png", output / "b_index.png")
    (output / "c_overlay.png").symlink_to(folder / "c.png")
    before = _files(folder)
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={folder}", f"--output={folder}", "--overwrite")
    message = str(stopped.value.code)
    (line,) = message.splitlines()
    assert line.startswith(f"error: {folder / 'a.png'}: its result would replace")
    assert str(folder / "a_color.png") in line and "another --output" in line
    assert before.items() <= _files(folder).items()
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={folder}", f"--output={output}", "--overwrite")
    lines = str(stopped.value.code).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        str(folder / "b.png"),
        str(folder / "c.png"),
    ]
    told = capsys.readouterr().out
    assert f"3 of 5 images written to {output}, 2 failed" in told
    assert before.items() <= _files(folder).items()
    assert (output / "d_index.png").is_file()


def test_predict_makes_up_for_what_a_killed_call_left(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(_picture(seed)[1]).save(folder / f"{seed}.png")
    command = (f"--input={folder}", f"--output={tmp_path / 'out'}")
    _predict(*command)
    whole = _files(tmp_path / "out")
    (tmp_path / "out" / "0_color.png").unlink()
    (tmp_path / "out" / ".0_color.png.part").write_bytes(b"the beginning of a PNG")
    _predict(*command)
    assert _files(tmp_path / "out") == whole


def test_one_bad_file_does_not_end_predict(run, tmp_path, monkeypatch, capsys):
    """Whatever it raises, and pipes that would be waited for."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("a", "b", "c", "d")
    for seed, name in enumerate(names):
        Image.fromarray(_picture(seed)[1]).save(folder / f"{name}.png")
    contents = {(folder / f"{name}.png").read_bytes(): name for name in names}
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(tmp_path / "pipe.png")
    errors = {"a": MemoryError(), "b": ZeroDivisionError("odd\nfile"), "c": None}
    read = predict.decode_array

    def decode_array(content, pixels):
        error = errors[contents[content]]
        if error is not None:
            raise error
        return read(content, pixels)

    monkeypatch.setattr(predict, "decode_array", decode_array)
    (tmp_path / "out" / "d_index.png").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        _predict("--input", folder, tmp_path / "pipe.png", f"--output={tmp_path}/out")
    message = str(stopped.value.code)
    assert "1 of 5 images written" in capsys.readouterr().out
    assert (tmp_path / "out" / "c_overlay.png").is_file()
    lines = message.splitlines()
    assert [line.split(": ")[1].removeprefix(f"{tmp_path}/") for line in lines] == [
        "in/pipe.png",
        "in/a.png",
        "in/b.png",
        "in/d.png",
        "pipe.png",
    ]
    assert "MemoryError" in lines[1] and lines[2].endswith("odd")


def test_names_with_commas_and_control_characters(run, tmp_path, capsys):
    image = Image.fromarray(_picture(0)[1])
    names = ("a,b.png", "c.png", "d\x1b[31m.png")
    for name in names:
        image.save(tmp_path / name)
    _predict(f"--input={tmp_path / names[0]}", f"--output={tmp_path / 'one'}")
    assert (tmp_path / "one" / "a,b_index.png").is_file()
    _predict(
        "--input",
        tmp_path / names[0],
        f"{tmp_path / names[1]},{tmp_path / names[2]}",
        f"--output={tmp_path / 'three'}",
    )
    assert len(_files(tmp_path / "three")) == 9
    (tmp_path / names[2]).write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={tmp_path / names[2]}", f"--output={tmp_path / 'none'}")
    assert "\\x1b[31m" in str(stopped.value.code)
    with pytest.raises(SystemExit, match="arguments of their own"):
        _predict(f"--input={tmp_path}/x,y.png", f"--output={tmp_path / 'none'}")
    assert "\x1b" not in capsys.readouterr().out


def test_a_full_disk_ends_predict_with_one_line(run, tmp_path, monkeypatch):
    for name in ("a", "b"):
        Image.fromarray(_picture(0)[1]).save(tmp_path / f"{name}.png")

    def write_bytes(path, content):
        if "b_" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        atomic_write.write_bytes(path, content)

    monkeypatch.setattr(prediction_files, "write_bytes", write_bytes)
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
    assert stopped.value.code == (
        f"error: {tmp_path / 'out' / 'b_index.png'}: No space left on device; 1 image "
        "written; run the same command again for the others"
    )


def test_an_evaluation_that_cannot_be_written_is_printed(
    run, monkeypatch, tmp_path, capsys
):
    bright, image = _picture(0)
    dataset = Dataset([Example("0", image, bright.astype(np.uint8))])
    monkeypatch.setattr(runs, "open_split", lambda *_: dataset)
    (tmp_path / "eval_val_best.json").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*eval_val_best\.json"):
        launch_evaluate.main([f"--workdir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "mean IoU         100.00" in printed and "written to" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--crop=33"], r"--crop=33 is for protocols with windows"),
        (["--protocol=center_crop", "--pad_to=8"], r"--pad_to=8 is for --protocol="),
        (["--dataset=voc"], r"trained on 'synthetic'; --other_data"),
        (["--data_dir=/nowhere"], r"no prepared data set 'synthetic' in '/nowhere'"),
        (["--data_dir=/nowhere", "--other_data"], r"no prepared data set"),
    ],
)
def test_evaluate_uses_or_refuses_each_argument(run, tmp_path, arguments, said):
    run.config.data.name = "synthetic"
    with pytest.raises(SystemExit, match=said):
        launch_evaluate.main([f"--workdir={tmp_path}", *arguments])


@pytest.mark.parametrize("argument", ["--checkpoint=last", "--other_data"])
def test_evaluate_refuses_a_run_s_argument_for_a_file(argument):
    with pytest.raises(SystemExit, match="is for a run; --weights names a file"):
        launch_evaluate.main(["--weights=x", "--dataset=voc", argument])


def test_evaluate_takes_windows_of_another_size(run, monkeypatch, tmp_path):
    bright, image = _picture(0)
    dataset = Dataset([Example("0", image, bright.astype(np.uint8))])
    monkeypatch.setattr(runs, "open_split", lambda *_: dataset)
    launch_evaluate.main(
        [f"--workdir={tmp_path}", "--protocol=center_crop", "--crop=8"]
    )
    path = tmp_path / "eval_val_best_center_crop_crop_8.json"
    written = json.loads(path.read_text())
    assert written["window"] == 8
    assert np.sum(written["confusion"]) == 64


def test_an_evaluation_replaces_only_one_of_the_same_kind(run, monkeypatch, tmp_path):
    bright, image = _picture(0)
    dataset = Dataset([Example("0", image, bright.astype(np.uint8))])
    monkeypatch.setattr(runs, "open_split", lambda *_: dataset)
    kinds = {
        "": [],
        "_whole": ["--protocol=whole"],
        "_scales_0.5-1.0": ["--scales=0.5,1"],
        "_scales_0.5-1.0_flip": ["--flip", "--scales=0.5,1"],
        "_pad_to_8": ["--pad_to=8"],
        "_center_crop_crop_8": ["--protocol=center_crop", "--crop=8"],
    }
    settings = run.config.to_dict()
    for name, arguments in kinds.items():
        run.config.update(settings)
        for _ in range(2 if name == "" else 1):
            launch_evaluate.main([f"--workdir={tmp_path}", *arguments])
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found.keys() == {f"eval_val_best{name}.json" for name in kinds}
    assert [found[f"eval_val_best{name}.json"]["scales"] for name in kinds] == [
        *([1.0], [1.0], [0.5, 1.0], [0.5, 1.0], [1.0], [1.0])
    ]
    flips = [name for name in kinds if found[f"eval_val_best{name}.json"]["flip"]]
    assert flips == ["_scales_0.5-1.0_flip"]


@pytest.mark.parametrize("scales", ["inf", "nan", "0", "1,-1"])
def test_scales_that_no_image_has(run, tmp_path, scales):
    with pytest.raises(SystemExit, match=r"eval\.scales=.*give finite factors above 0"):
        launch_evaluate.main([f"--workdir={tmp_path}", f"--scales={scales}"])


def test_the_same_data_elsewhere_is_found_and_other_data_are_refused(
    run, tmp_path, capsys
):
    """Prepared sets of one run: moved, of another source, and of other classes."""
    for name, train in (("mine", 13), ("other", 14)):
        prepare_synthetic(tmp_path / name, train=train, val=4)
    mine, other = (
        open_dataset(str(tmp_path / name), "synthetic").facts
        for name in ("mine", "other")
    )
    assert mine.fingerprint != other.fingerprint
    run = dataclasses.replace(run, facts=mine)
    run.config.data.name, run.config.data.data_dir = "synthetic", "gone"
    with pytest.raises(FileNotFoundError, match="gone"):
        runs.open_split(run, "val")
    (tmp_path / "mine").rename(tmp_path / "moved")
    found = runs.open_split(runs.use_data(run, str(tmp_path / "moved")), "val")
    assert len(found) == 4
    there = runs.use_data(run, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="other data than the run") as raised:
        runs.open_split(there, "val")
    for fact in (mine.fingerprint, other.fingerprint, "--other_data", "--data_dir"):
        assert fact in str(raised.value)
    asked = runs.use_data(run, str(tmp_path / "other"), other=True)
    assert asked.facts.fingerprint == other.fingerprint
    assert asked.facts.pixels == mine.pixels
    assert len(runs.open_split(asked, "val")) == 4
    with pytest.raises(ValueError, match="leave the argument out"):
        runs.use_data(run, str(tmp_path / "moved"), other=True)
    renamed = dataclasses.replace(mine, class_names=mine.class_names[::-1])
    with pytest.raises(ValueError, match="does not fit the run: classes"):
        runs.use_data(
            dataclasses.replace(run, facts=renamed), str(tmp_path / "other"), other=True
        )


def test_predictions_lie_over_the_picture_as_a_viewer_shows_it(run, tmp_path):
    """A camera held upright stores the picture lying, with orientation 6."""
    bright, image = _picture(0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened))
    assert shown.shape == (16, 12, 3)
    _predict(f"--input={tmp_path / 'a.png'}", f"--output={tmp_path / 'out'}")
    turned = np.rot90(bright, -1)
    index, color, over = (
        Image.open(tmp_path / "out" / f"a_{kind}.png")
        for kind in ("index", "color", "overlay")
    )
    for picture in (index, color, over):
        assert picture.size == (12, 16)
        assert picture.getexif().get(274, 1) == 1
    np.testing.assert_array_equal(np.asarray(index), turned)
    np.testing.assert_array_equal(
        np.asarray(color), np.array(PALETTE)[turned.astype(int)]
    )
    np.testing.assert_allclose(
        np.asarray(over), shown / 2 + np.asarray(color) / 2, atol=0.5
    )
