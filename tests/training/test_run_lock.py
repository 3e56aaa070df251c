"""One run at a time in a workdir, whatever becomes of the one before."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time

import pytest

from mpmc_jax.training import run_lock
from mpmc_jax.training.workdir import WorkdirError
from tests.support.programs import start_code, wait_for

HOLD = (
    "import pathlib, sys\n"
    "from mpmc_jax.training import run_lock\n"
    "with run_lock.hold(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


@contextlib.contextmanager
def _holder(directory):
    with start_code(HOLD, directory) as process:
        wait_for(process, "held")
        yield process
        process.kill()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.5)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    with _holder(tmp_path / "run") as first:
        with (
            pytest.raises(WorkdirError) as caught,
            run_lock.hold(tmp_path / "run"),
        ):
            pass
        message = str(caught.value)
        assert f"--workdir={tmp_path / 'run'} is in use by another run" in message
        assert f"process {first.pid} on {socket.gethostname()}, started " in message
        assert re.search(r"started \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", message)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / "run" / ".lock").exists()
        begin = time.monotonic()
        with run_lock.hold(tmp_path / "run"):
            assert time.monotonic() - begin < run_lock.HEARTBEAT_SECONDS
            found = json.loads((tmp_path / "run" / ".lock.json").read_text())
            assert found["process"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def _move_to_another_host(directory):
    """Leaves the lock as a run on another machine would have, held or not."""
    path = directory / ".lock"
    with run_lock.hold(directory):
        text = path.read_text()
        holder = (directory / ".lock.json").read_text()
    assert (host := re.search(r"^host=(.*)$", text, re.MULTILINE))
    path.write_text(text.replace(host[0], "host=elsewhere"))
    (directory / ".lock.json").write_text(
        holder.replace(socket.gethostname(), "elsewhere")
    )


def test_a_run_on_another_host_that_still_writes_is_left_alone(tmp_path, quick):
    _move_to_another_host(tmp_path)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.5):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(WorkdirError, match=r"process \d+ on elsewhere, started"),
            run_lock.hold(tmp_path),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert "host=elsewhere" in (tmp_path / ".lock").read_text()


def test_a_run_killed_on_another_host_is_waited_for(tmp_path, quick):
    _move_to_another_host(tmp_path)
    begin = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begin >= run_lock.LEASE_SECONDS
        assert "host=elsewhere" not in (tmp_path / ".lock").read_text()


def test_a_run_whose_lock_is_taken_ends_at_once(tmp_path, quick, monkeypatch, capsys):
    """As after a pause that was longer than the lease."""
    ended = threading.Event()
    monkeypatch.setattr(run_lock.os, "_exit", lambda status: ended.set())
    with run_lock.hold(tmp_path):
        (tmp_path / ".lock").unlink()
        assert ended.wait(10)
    assert "was lost (marker-missing)" in capsys.readouterr().err


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(WorkdirError, match="cannot write to --workdir=.*directory"),
        run_lock.hold(tmp_path / "file" / "run"),
    ):
        pass
