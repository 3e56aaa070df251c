"""The programs that read a run, as processes: full disks, closed pipes, kills."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.support.data_sets import prepare_synthetic
from tests.support.programs import CONFIG, SMALL, run, start

pytestmark = pytest.mark.full

SUPERVISED = CONFIG.replace("unimatch,mpmc=recommended", "supervised")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, beside its data."""
    place = tmp_path_factory.mktemp("limits")
    prepare_synthetic(place / "data", train=13, val=4)
    once = ("--config.train.steps=1", "--config.train.eval_every=1")
    command = (f"--config={SUPERVISED}", f"--config.data.data_dir={place / 'data'}")
    run("launch.train", *command, *SMALL, *once, f"--workdir={place / 'run'}")
    return place / "run"


@pytest.fixture
def workdir(trained, tmp_path):
    """The run, for a test that writes to it."""
    return shutil.copytree(trained, tmp_path / "run")


def _shell(script):
    """A command that runs its arguments as "$@" of a line of bash."""
    return ("bash", "-c", script, "bash")


def _finish(process, status):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == status, output[-4000:]
    assert "Traceback" not in output
    return output


def _errors(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


def _files(folder):
    """Path below the folder -> content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _images(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def test_evaluate_on_a_full_disk_leaves_no_part_of_a_result(workdir):
    before = _files(workdir).keys()
    evaluate = ("launch.evaluate", f"--workdir={workdir}")
    # 1 KiB a file: the result is larger.
    output = _finish(start(*evaluate, below=_shell('ulimit -f 1; exec "$@"')), 1)
    result = workdir / "eval_val_best.json"
    (line,) = _errors(output)
    assert "File too large" in line and str(result) in line
    assert output.splitlines()[-1] == line and "written to" not in output
    assert _files(workdir).keys() == before
    output = _finish(start(*evaluate), 0)
    assert "miou" in json.loads(result.read_text())["scalars"]


@pytest.mark.parametrize(
    ("redirect", "status", "said"),
    [
        (">/dev/full", 1, ["error: [Errno 28] No space left on device"]),
        ("> >(:)", 128 + signal.SIGPIPE, []),
    ],
)
def test_a_result_is_written_where_its_table_cannot_be_shown(
    workdir, redirect, status, said
):
    evaluate = ("launch.evaluate", f"--workdir={workdir}")
    process = start(*evaluate, below=_shell(f'exec "$@" {redirect}'))
    assert _errors(_finish(process, status)) == said
    result = json.loads((workdir / "eval_val_best.json").read_text())
    assert 0 <= result["scalars"]["miou"] <= 1


def test_predict_writes_the_others_where_one_image_is_too_large(trained, tmp_path):
    _images(tmp_path / "in", ["a.png", "z.png"])
    huge = tmp_path / "in" / "huge.png"
    Image.new("RGB", (12_000, 12_000)).save(huge)
    predict = ("launch.predict", f"--workdir={trained}", f"--input={tmp_path / 'in'}")
    predict = (*predict, "--window_above=200000000")
    limit = _shell('ulimit -v 8000000; exec "$@"')
    output = _finish(start(*predict, f"--output={tmp_path / 'out'}", below=limit), 1)
    assert "2 of 3 images written" in output
    (line,) = _errors(output)
    assert line.startswith(f"error: {huge}: ") and "GB are free" in line
    assert _files(tmp_path / "out").keys() == {
        f"{name}_{kind}.png"
        for name in ("a", "z")
        for kind in ("index", "color", "overlay")
    }


def test_predict_that_is_killed_often_ends_as_one_that_never_was(trained, tmp_path):
    names = [f"{day}/{number}.png" for day in "abc" for number in range(30)]
    _images(tmp_path / "in", names)
    predict = ("launch.predict", f"--workdir={trained}", f"--input={tmp_path / 'in'}")
    _finish(start(*predict, f"--output={tmp_path / 'whole'}"), 0)
    whole = _files(tmp_path / "whole")
    assert len(whole) == 3 * len(names)
    killed, done = tmp_path / "killed", 0
    for _ in range(2):
        process = start(*predict, f"--output={killed}")
        # Shortly after it wrote some more.
        while process.poll() is None and len(_files(killed)) <= done + 10:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        there = _files(killed)
        done = len(there)
        finished = {k: v for k, v in there.items() if not k.endswith(".part")}
        assert finished.items() <= whole.items()
    output = _finish(start(*predict, f"--output={killed}"), 0)
    assert "already there (--overwrite replaces them)" in output
    assert _files(killed) == whole
