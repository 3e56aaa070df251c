"""Faults of docs/faults.md, injected into programs as a user runs them."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from array_record.python import array_record_module

from launch import multihost
from tests.support.data_sets import prepare_synthetic
from tests.support.programs import (
    CONFIG,
    SMALL,
    free_address,
    read_metrics,
    start,
    wait_for,
)

# The plain network: what is tested here does not depend on the method.
SUPERVISED = CONFIG.replace("unimatch,mpmc=recommended", "supervised")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "data"
    prepare_synthetic(folder, train=13, val=4)
    return folder


def _start(data, workdir, *more, below=()):
    command = (f"--config={SUPERVISED}", f"--config.data.data_dir={data}", *SMALL)
    command += (*more, f"--workdir={workdir}")
    return start("launch.train", *command, below=below)


def _finish(process, status):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == status, output[-4000:]
    return output


def _steps(workdir):
    lines = read_metrics(workdir)
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.mark.full
def test_a_record_damaged_after_preparation(data, tmp_path):
    """Behind the third step; mended, the same command goes on."""
    damaged = tmp_path / "data"
    shutil.copytree(data, damaged)
    (records,) = damaged.rglob("*-train.array_record*")
    whole = records.read_bytes()
    # Records lie behind one another; these bytes are the first that an order meets.
    for offset in range(54_000, len(whole), 4_000):
        content = bytearray(whole)
        content[offset : offset + 3] = bytes(255 - x for x in content[offset:][:3])
        records.write_bytes(content)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = _start(damaged, tmp_path / "run")
        output, _ = process.communicate(timeout=900)
        if process.returncode and "step 1/6" in output:
            break
    else:
        pytest.fail("no place in the file is read behind the first step")
    assert process.returncode == 1
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "of train cannot be read from" in line and str(damaged) in line
    assert "prepare the data set again" in line
    done = _steps(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / str(done[-1])).is_dir()
    records.write_bytes(whole)
    output = _finish(_start(damaged, tmp_path / "run"), 0)
    assert f"resuming from step {done[-1]}" in output
    assert _steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.full
def test_an_evaluation_that_fails(data, tmp_path):
    """Its step is saved; mended, the same command evaluates it first."""
    damaged = tmp_path / "data"
    shutil.copytree(data, damaged)
    (records,) = damaged.rglob("*-val.array_record*")
    whole = records.read_bytes()
    # Pictures whose headers, which are read before training, are sound.
    reader = array_record_module.ArrayRecordReader(str(records))
    contents = reader.read_all()
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(records), "group_size:1")
    for content in contents:
        writer.write(re.sub(rb"(?s)IDAT.{9}", b"IDAT" + bytes(9), content))
    writer.close()
    output = _finish(_start(damaged, tmp_path / "run"), 1)
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("error: record 'scene_") and "damaged" in last
    assert _steps(tmp_path / "run") == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    records.write_bytes(whole)
    output = _finish(_start(damaged, tmp_path / "run"), 0)
    assert output.index("resuming from step 3") < output.index("step 3  val/miou")
    assert output.index("step 3  val/miou") < output.index("step 4/6")


@pytest.mark.full
def test_a_run_that_is_killed_often_ends_as_one_that_never_was(data, tmp_path):
    """SIGKILL at moments drawn over the whole program, its start included.

    The other run has its images on the device, which changes nothing either.
    """
    begin = time.monotonic()
    resident = "--config.data.resident=True"
    _finish(_start(data, tmp_path / "whole", resident), 0)
    seconds = time.monotonic() - begin
    killed, draw = tmp_path / "killed", random.Random(0)
    for _ in range(6):
        process = _start(data, killed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.2, 0.9) * seconds)
        process.kill()
        process.communicate()
        if (killed / "manifest.json").exists():
            for name in ("config.json", "manifest.json"):
                json.loads((killed / name).read_text())
    output = _finish(_start(data, killed), 0)
    assert "in use by" not in output
    assert _steps(killed) == [1, 2, 3, 4, 5, 6]

    def last(directory):
        path = directory / "checkpoints" / "6" / "meta" / "metadata"
        return json.loads(path.read_text())

    assert last(killed) == last(tmp_path / "whole")
    names = [path.name for path in (killed / "checkpoints").iterdir()]
    assert not [name for name in names if "tmp" in name or "damaged" in name]
    assert not list((killed / "checkpoints").glob("deleted/*"))
    assert not (killed / ".lock").exists()


def test_data_that_is_gone(data, tmp_path):
    gone = tmp_path / "data"
    shutil.copytree(data, gone)
    (records,) = gone.rglob("*-train.array_record*")
    records.unlink()
    output = _finish(_start(gone, tmp_path / "run"), 1)
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and str(gone) in last
    assert "prepare" in last and "Traceback" not in output


@pytest.mark.full
def test_metrics_that_cannot_be_written(data, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    output = _finish(_start(data, tmp_path / "run"), 1)
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and "metrics.jsonl" in last
    assert "Is a directory" in last and "Traceback" not in output


@pytest.mark.full
def test_a_disk_that_is_full_while_a_checkpoint_is_written(data, tmp_path):
    # 400 KiB a file: metrics fit, arrays do not. Python ignores the signal of it.
    limit = ("bash", "-c", 'ulimit -f 400; exec "$@"', "bash")
    output = _finish(_start(data, tmp_path / "run", below=limit), 1)
    assert "Traceback" not in output and "Event loop" not in output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: saving to {tmp_path / 'run' / 'checkpoints'}")
    assert "File too large" in last and "run the same command again" in last
    output = _finish(_start(data, tmp_path / "run"), 0)
    assert _steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_directory_below_a_file(data, tmp_path):
    (tmp_path / "file").touch()
    output = _finish(_start(data, tmp_path / "file" / "run"), 1)
    last = output.splitlines()[-1]
    assert last.startswith(f"error: cannot write to --workdir={tmp_path / 'file'}")
    assert "Not a directory" in last and "Traceback" not in output


def _limited(kilobytes):
    """A command that runs its arguments with so much address space."""
    return ("bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "bash")


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        ("data.crop=50000", "images of 50000 x 50000 pixels"),
        pytest.param(
            "train.batch_size=1000000000", "1000000000 images", marks=pytest.mark.full
        ),
    ],
)
def test_a_step_that_no_memory_holds_is_refused_before_any_is_taken(
    data, tmp_path, setting, size
):
    process = _start(
        data, tmp_path / "run", f"--config.{setting}", below=_limited(8_000_000)
    )
    output = _finish(process, 1)
    last = output.splitlines()[-1]
    assert last.startswith("error: a step needs more than ") and size in last
    assert "lower data.crop, train.batch_size" in last and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def _pair(data, workdir, *more):
    address = free_address()
    several = (
        "--config.train.devices=0",
        "--config.train.steps=4000",
        "--config.train.eval_every=4000",
        "--config.train.checkpoint_every=4000",
        f"--coordinator={address}",
        "--processes=2",
    )
    return [
        _start(data, workdir, *several, *more, f"--process={index}")
        for index in range(2)
    ]


def test_processes_that_differ_say_in_what_and_train_nothing(data, tmp_path):
    prepare_synthetic(tmp_path / "other", train=11, val=4)
    several = ("--config.train.devices=0", f"--coordinator={free_address()}")
    several += ("--processes=2",)
    pair = [
        _start(data, tmp_path / "run", *several, "--process=0"),
        _start(
            tmp_path / "other",
            tmp_path / "run",
            *several,
            "--process=1",
            "--config.optimizer.lr=0.5",
            "--config.seed=7",
            "--config.data.crop=33",
            "--config.data.threads=1",
        ),
    ]
    for index, process in enumerate(pair):
        output = _finish(process, 1)
        assert f"process {index} of 2: error: the processes of this run" in output
        assert "config.seed: 0 in process 0, 7 in process 1" in output
        assert re.search(r"optimizer.lr: [\d.]+ in process 0, 0.5 in process 1", output)
        assert "config.data.crop: 49 in process 0, 33 in process 1" in output
        assert "data.fingerprint: " in output and "data.split_crc32: " in output
        # Where the data lie, and how they are read, may differ.
        assert "data_dir" not in output and "data.threads" not in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_all_processes_end_where_one_is_refused(data, tmp_path):
    several = ("--config.train.devices=0", f"--coordinator={free_address()}")
    several += ("--processes=2",)
    pair = [
        _start(data, tmp_path / "run", *several, "--process=0"),
        _start(tmp_path / "gone", tmp_path / "run", *several, "--process=1"),
    ]
    first, second = (_finish(process, 1) for process in pair)
    assert "process 0 of 2: error: process 1 failed: no prepared data set" in first
    assert "process 1 of 2: error: no prepared data set 'synthetic'" in second
    assert "Traceback" not in first + second


@pytest.mark.full
def test_all_processes_end_where_wandb_starts_no_run(data, tmp_path):
    """The first alone writes to it, and the others do not wait for the first."""
    stub = 'def init(**options):\n    raise RuntimeError("no login")\n'
    (tmp_path / "wandb.py").write_text(stub)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = (
        f"--config={SUPERVISED}",
        f"--config.data.data_dir={data}",
        *SMALL,
        "--config.train.wandb=seg",
        "--config.train.devices=0",
        f"--coordinator={free_address()}",
        "--processes=2",
        f"--workdir={tmp_path / 'run'}",
    )
    pair = [
        start("launch.train", *command, f"--process={index}", PYTHONPATH=path)
        for index in range(2)
    ]
    first, second = (_finish(process, 1) for process in pair)
    said = "train.wandb='seg': wandb starts no run (no login); `wandb login`"
    assert f"process 0 of 2: error: {said}" in first
    assert f"process 1 of 2: error: process 0 failed: {said}" in second
    assert "Traceback" not in first + second


@pytest.mark.full
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_others_which_name_it(data, tmp_path, dead):
    pair = _pair(data, tmp_path / "run")
    wait_for(pair[0], "step 3/4000")
    begin = time.monotonic()
    os.kill(pair[dead].pid, signal.SIGKILL)
    output, _ = pair[1 - dead].communicate(timeout=300)
    # A heartbeat, and what the verdict takes to arrive.
    assert time.monotonic() - begin < multihost.HEARTBEAT_SECONDS + 30
    assert pair[1 - dead].returncode in (1, -signal.SIGABRT)
    if dead == 0:
        assert "Either the leader task was preempted/died" in output
    else:
        assert "error: process 0 of 2 failed, or lost another process" in output
        assert "Task 1 heartbeat timeout" in output
    pair[dead].communicate()


@pytest.mark.full
def test_a_signal_to_one_process_stops_all_behind_the_same_step(data, tmp_path):
    pair = _pair(data, tmp_path / "run")
    wait_for(pair[0], "step 3/4000")
    pair[1].send_signal(signal.SIGTERM)
    first, second = (_finish(process, 75) for process in pair)
    done = _steps(tmp_path / "run")[-1]
    assert f"stopped by another process at step {done}, which is saved" in first
    assert f"stopped by SIGTERM at step {done}, which is saved" in second
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()


class _ExitError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit("error: no such file"), "process 0 of 2: error: no such file"),
        (RuntimeError("a defect"), "RuntimeError: a defect"),
    ],
)
def test_a_process_that_fails_does_not_wait_for_the_others(
    monkeypatch, capsys, error, said
):
    def leave(status):
        raise _ExitError(status)

    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.os, "_exit", leave)
    with pytest.raises(_ExitError, match="1"), multihost.exit_on_failure():
        raise error
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("status", [None, 0, 75])
def test_processes_that_end_together_end_as_usual(monkeypatch, status):
    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit), multihost.exit_on_failure():
        sys.exit(status)
