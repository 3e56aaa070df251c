"""A run of two processes, each with a device, beside one process with both."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from launch import multihost, rendezvous
from tests.support.data_sets import prepare_synthetic
from tests.support.programs import (
    CONFIG,
    ENVIRONMENT,
    ROOT,
    SMALL,
    free_address,
    read_metrics,
    run,
    start,
    start_code,
    wait_for,
)
from tests.support.xla import device_flags


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path):
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    command = (
        f"--config={CONFIG.replace('unimatch', 'supervised')}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.train.devices=0",
        *SMALL,
    )
    outputs = _pair("launch.train", *command, f"--workdir={tmp_path / 'two'}")
    assert "2 devices" in outputs[0]
    # Only the first one reports.
    assert "step 6/6" in outputs[0] and "step 6/6" not in outputs[1]
    workdir = f"--workdir={tmp_path / 'one'}"
    alone = start("launch.train", *command, workdir, XLA_FLAGS=device_flags(2))
    output, _ = alone.communicate(timeout=600)
    assert alone.returncode == 0, output[-4000:]
    found, expected = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "val/miou"):
            assert (name in one) == (name in other)
            if name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-3)
    assert (tmp_path / "two" / "checkpoints" / "6").is_dir()
    _go_on_behind_a_damaged_checkpoint(tmp_path / "two", command, expected)
    _evaluate_together(tmp_path / "two")


@pytest.mark.full
def test_two_processes_end_early_together(tmp_path):
    """A score that never rises ends both at the second evaluation, and once more."""
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    command = (
        f"--config={CONFIG.replace('unimatch', 'supervised')}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.train.devices=0",
        *SMALL,
        "--config.train.eval_every=2",
        "--config.train.patience=1",
        "--config.eval.best_metric=iou/pole",
        # Nothing is learned, and no pole is ever predicted.
        "--config.optimizer.lr=0.0",
        f"--workdir={tmp_path / 'run'}",
    )
    for _ in range(2):
        outputs = _pair("launch.train", *command)
        assert "ending at step 4 of 6: no higher val/iou/pole in 1 eval" in outputs[0]
        scores = [x for x in read_metrics(tmp_path / "run") if "val/iou/pole" in x]
        assert [(x["step"], x["val/iou/pole"]) for x in scores] == [(2, 0), (4, 0)]


def _pair(program, *command):
    """What two processes of a program said, which must have ended well."""
    address = free_address()
    several = [
        start(
            program,
            *command,
            f"--coordinator={address}",
            "--processes=2",
            f"--process={index}",
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in several]
    for process, output in zip(several, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def _go_on_behind_a_damaged_checkpoint(workdir, command, expected):
    """One of them moves it away, and both go on from the one before."""
    newest = workdir / "checkpoints" / "6"
    data = max(newest.glob("state/**/*"), key=lambda p: p.stat().st_size * p.is_file())
    data.write_bytes(data.read_bytes()[:100])
    outputs = _pair("launch.train", *command, f"--workdir={workdir}")
    assert "moved to damaged-6" in outputs[0] and "moved to" not in outputs[1]
    assert "resuming from step 4" in outputs[0]
    found = [line["step"] for line in read_metrics(workdir)]
    assert found == [line["step"] for line in expected]


def _evaluate_together(workdir):
    """Two processes count as one does; the first one writes."""

    def counted():
        return json.loads((workdir / "eval_val_last.json").read_text())

    command = (f"--workdir={workdir}", "--checkpoint=last")
    outputs = _pair("launch.evaluate", *command)
    together = counted()
    assert "written to" in outputs[0] and "written to" not in outputs[1]
    run("launch.evaluate", *command)
    alone = counted()
    assert together["num_images"] == alone["num_images"] == 4
    assert together["manifest"]["process_count"] == 2
    np.testing.assert_array_equal(together["confusion"], alone["confusion"])


@pytest.mark.parametrize(
    "given",
    [
        {"coordinator": "a:1", "count": 2, "index": 2},
        {"coordinator": "", "count": 2, "index": 0},
        {"coordinator": "a:1", "count": 0, "index": -1},
        {"coordinator": "a", "count": 2, "index": 0},
        {"coordinator": "a:b", "count": 2, "index": 0},
        {"coordinator": "a:99999", "count": 2, "index": 0},
    ],
)
def test_processes_set_incompletely_are_refused(given):
    with pytest.raises(ValueError, match="all three are needed"):
        multihost.join(discover=False, **given)


def test_processes_set_and_to_be_discovered_are_refused():
    with pytest.raises(ValueError, match="--distributed and --coordinator: give one"):
        multihost.join(discover=True, coordinator="a:1", count=2, index=0)


def test_where_jax_discovers_nothing_the_flags_are_named():
    output = run("launch.evaluate", "--workdir=w", "--distributed", fails=True)
    (line,) = output.splitlines()
    assert line.startswith("error: no other processes were discovered")
    assert "--coordinator=HOST:PORT" in line


def _wait_together(seconds, *started):
    """What each (count, index) is told, all of them started at once."""
    address, told = free_address(), {}

    def wait(number, count, index):
        try:
            rendezvous.wait(address, count, index, seconds)
            told[number] = ""
        except ValueError as error:
            told[number] = str(error)

    threads = [
        threading.Thread(target=wait, args=(number, *each))
        for number, each in enumerate(started)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [told[number] for number in range(len(started))]


def test_processes_wait_for_each_other():
    assert _wait_together(30, (3, 2), (3, 0), (3, 1)) == [""] * 3


def test_a_process_that_does_not_come_is_named_within_a_minute():
    assert multihost.START_SECONDS < 60
    for told in _wait_together(2, (4, 0), (4, 1)):
        assert "no sign of process 2, 3 of 4" in told
    (told,) = _wait_together(1, (2, 1))
    assert "process 1 of 2 does not reach process 0" in told


def test_a_process_that_comes_twice_is_named():
    for told in _wait_together(30, (3, 0), (3, 1), (3, 1)):
        assert "process 1 of 3 was started twice" in told
    zeros = _wait_together(1, (2, 0), (2, 0))
    assert any("is another process 0 running?" in told for told in zeros)


def test_processes_told_another_number_are_refused():
    for told in _wait_together(30, (2, 0), (3, 1)):
        assert "process 1 has --processes=3, 0 has 2" in told


def test_what_else_comes_to_the_port_does_no_harm():
    address, told = free_address(), []
    host, port = address.split(":")
    zero = threading.Thread(
        target=lambda: told.append(rendezvous.wait(address, 2, 0, 30))
    )
    zero.start()
    for content in (b"GET / HTTP/1.1\n", b"[]\n", b'{"process": "x"}\n', b""):
        for _ in range(100):
            with contextlib.suppress(OSError):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(content)
                break
            time.sleep(0.1)
    rendezvous.wait(address, 2, 1, 30)
    zero.join()
    assert told == [None]


JOIN = (
    "import sys\n"
    "from launch import multihost\n"
    "address, count, index, multihost.START_SECONDS = sys.argv[1], *map(int, "
    "sys.argv[2:])\n"
    "multihost.join(discover=False, coordinator=address, count=count, index=index)\n"
    "print('joined', flush=True)\n"
    "sys.stdin.read()\n"
)


def _join(address, count, index, seconds=50):
    """A process that joins a run, and stays until its input ends."""
    return start_code(JOIN, address, count, index, seconds)


def test_a_run_under_way_is_left_alone_by_a_process_too_many():
    """JAX's own service would end the run."""
    address = free_address()
    pair = [_join(address, 2, index) for index in (0, 1)]
    for process in pair:
        wait_for(process, "joined")
    with pytest.raises(ValueError, match="a run that is under way"):
        rendezvous.wait(address, 2, 1, 30)
    with pytest.raises(ValueError, match="is another process 0 running"):
        rendezvous.wait(address, 2, 0, 30)
    for process in pair:
        process.stdin.close()
    for process in pair:
        assert process.wait(timeout=120) == 0, process.stdout.read()
        process.stdout.close()


def test_where_jax_waits_in_vain_there_is_one_line(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(multihost, "START_SECONDS", 0.1)
    monkeypatch.setattr(multihost.os, "_exit", lambda status: ended.set())
    with multihost._time_limit("process 1 of 2"):
        assert ended.wait(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process 1 of 2 waited 0.1 s for the other")


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.setattr(multihost.jax.distributed, "initialize", os.abort)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    multihost.join(discover=False, coordinator="", count=0, index=-1)


def test_under_srun_jax_finds_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(
        multihost.jax.distributed, "initialize", lambda **given: told.append(given)
    )
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    multihost.join(discover=False, coordinator="", count=0, index=-1)
    seconds = multihost.HEARTBEAT_SECONDS
    settings = ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    assert told == [dict.fromkeys(settings, seconds)]


def test_a_signal_before_the_loop_ends_a_process_of_several():
    """JAX's preemption service would only take note of it."""
    code = (
        "import os, signal, sys\n"
        "from launch import multihost\n"
        "multihost.join(discover=False, coordinator=sys.argv[1], count=1, index=0)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still there')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, free_address()],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "still there" not in done.stdout
