"""Prepared data sets: records that rotted, preparations that were stopped, progress."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from launch import check_data
from mpmc_jax.data import build, check, work
from mpmc_jax.data.info import open_dataset
from tests import trees
from tests.data_sets import prepare_synthetic


@pytest.fixture
def prepared(tmp_path):
    prepare_synthetic(tmp_path, train=5, val=2)
    return open_dataset(str(tmp_path), "synthetic")


def _fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        check_data.main(list(arguments))
    capsys.readouterr()
    return str(stop.value.code)


def _check(info, capsys):
    data_dir = info.directory.parent.parent
    return _fails(capsys, "--dataset=synthetic", f"--data_dir={data_dir}")


def test_a_damaged_record(prepared, capsys):
    path = next(prepared.directory.glob("*train.array_record*"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    text = _check(prepared, capsys)
    assert "record 'scene_" in text and "of train cannot be read from" in text
    assert "train: the records are not those that were written" in text
    assert f"remove {prepared.directory} and prepare the data set again" in text
    path.unlink()
    assert "train" in _check(prepared, capsys)


def test_damaged_facts(prepared, capsys):
    path = prepared.directory / "metadata.json"
    content = path.read_text()
    key = prepared.ids["train"][1]
    path.write_text(content.replace(key, "other"))
    text = _check(prepared, capsys)
    assert f"train, record 1 (other): holds {key!r}" in text
    path.write_text(content[:-40])
    assert f"{path}: damaged, or of another version" in _check(prepared, capsys)


def test_source_or_prepared(tmp_path, capsys):
    both = ("--dataset=voc", "--source=a", f"--data_dir={tmp_path}")
    assert "give one" in _fails(capsys, *both)


_KILLED = """
import sys, time
from mpmc_jax.data.builders import base
from tests.data_sets import prepare_synthetic
encode = base.SegmentationBuilder._encode
def slow(self, sample):
    print("writing", flush=True, file=sys.stderr)
    time.sleep(0.5)
    return encode(self, sample)
base.SegmentationBuilder._encode = slow
prepare_synthetic(sys.argv[1], train=40, val=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_data_set(how, tmp_path):
    # A shell's background jobs ignore Ctrl-C, and what they start would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            assert "writing\n" in iter(child.stderr.readline, "")
            assert list((tmp_path / "synthetic").glob("incomplete.*"))
            with pytest.raises(BlockingIOError, match="another run is preparing"):
                prepare_synthetic(tmp_path, train=5, val=2)
            start = time.monotonic()
            os.kill(child.pid, how)
            child.communicate(timeout=10)
        finally:
            child.kill()
    assert child.returncode != 0
    assert time.monotonic() - start < 5
    assert not build.is_prepared(str(tmp_path), "synthetic")
    prepare_synthetic(tmp_path, train=5, val=2)
    assert build.is_prepared(str(tmp_path), "synthetic")
    assert not list((tmp_path / "synthetic").glob("incomplete.*"))


def test_each_file_is_read_once_to_check_and_once_to_write(tmp_path, monkeypatch):
    trees.make_voc(tmp_path / "src")
    data = build.read_source("voc", str(tmp_path / "src"))
    read = []
    original = type(tmp_path).read_bytes
    monkeypatch.setattr(
        type(tmp_path),
        "read_bytes",
        lambda path: (read.append(path), original(path))[1],
    )
    report = check.check_source(data)
    assert len(read) == len(set(read)) == 10
    build.prepare(data, report.present, str(tmp_path / "data"), report.digests)
    assert all(read.count(path) == 2 for path in set(read))
    monkeypatch.undo()
    assert not build.has_changed(data, str(tmp_path / "data"))


def test_work_is_done_in_order_and_few_items_ahead():
    taken = []

    def numbers():
        for i in range(1000):
            taken.append(i)
            yield i

    results = work.in_order(lambda i: i * i, numbers())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) < 100
    assert list(results) == [i * i for i in range(3, 1000)]


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(work.shown(range(3), 3, "checking")) == [0, 1, 2]
    assert "checking" in stream.getvalue()
    assert "/3" in stream.getvalue()
