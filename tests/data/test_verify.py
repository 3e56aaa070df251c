"""Prepared data sets: records that rotted, preparations that were stopped, progress."""

import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch import check_data, prepare_data
from mpmc_jax.data import build, check, parallel_map, registry
from mpmc_jax.data import verify as prepared_lib
from mpmc_jax.data.builders import base
from mpmc_jax.data.dataset import has_changed, is_prepared, open_dataset
from mpmc_jax.types import Streams
from tests.support import trees
from tests.support.data_sets import config_for, make_folder, prepare_synthetic


@pytest.fixture
def prepared(tmp_path):
    prepare_synthetic(tmp_path, train=5, val=2)
    return open_dataset(str(tmp_path), "synthetic")


@pytest.mark.parametrize("name", ["data[1]", "data[0:3]", "d*?{a,b}", "d@3 %s"])
def test_a_folder_whose_name_looks_like_a_pattern(tmp_path, name):
    prepare_synthetic(tmp_path / name, train=3, val=2)
    info = open_dataset(str(tmp_path / name), "synthetic")
    assert not prepared_lib.check(info).problems
    assert len(info.records("train")) == 3 and len(info.records("val")) == 2


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
    assert f"{path}: damaged (JSONDecodeError" in _check(prepared, capsys)


def test_another_version_is_to_be_prepared_again(prepared, capsys):
    older = prepared.directory.rename(prepared.directory.with_name("1.3.0"))
    text = _check(prepared, capsys)
    assert text.count("\n") == 0
    assert f"{older.parent}: the data set was prepared as version 1.3.0, and" in text
    assert "prepare it again: python -m launch.prepare_data --dataset=synth" in text


def test_source_or_prepared(tmp_path, capsys):
    both = ("--dataset=voc", "--source=a", f"--data_dir={tmp_path}")
    assert "give one" in _fails(capsys, *both)


_KILLED = """
import sys, time
from mpmc_jax.data.builders import base
from tests.support.data_sets import prepare_synthetic
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
    assert not is_prepared(str(tmp_path), "synthetic")
    prepare_synthetic(tmp_path, train=5, val=2)
    assert is_prepared(str(tmp_path), "synthetic")
    assert not list((tmp_path / "synthetic").glob("incomplete.*"))


def test_each_file_is_read_once_to_check_and_once_to_write(tmp_path, monkeypatch):
    trees.make_voc(tmp_path / "src")
    data = registry.read_source("voc", str(tmp_path / "src"))
    read = []
    original = type(tmp_path).read_bytes
    monkeypatch.setattr(
        type(tmp_path),
        "read_bytes",
        lambda path: (read.append(path), original(path))[1],
    )
    report = check.check_source(data)
    assert len(read) == len(set(read)) == 10
    registry.prepare(data, report.present, str(tmp_path / "data"), report.digests)
    assert all(read.count(path) == 2 for path in set(read))
    monkeypatch.undo()
    assert not has_changed(data, str(tmp_path / "data"))


def test_work_is_done_in_order_and_few_items_ahead():
    taken = []

    def numbers():
        for i in range(1000):
            taken.append(i)
            yield i

    results = parallel_map.map_in_order(lambda i: i * i, numbers())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) < 100
    assert list(results) == [i * i for i in range(3, 1000)]


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(parallel_map.with_progress(range(3), 3, "checking")) == [0, 1, 2]
    assert "checking" in stream.getvalue()
    assert "/3" in stream.getvalue()


def _contents_of(data_dir):
    """Names of files, facts and records; a record's fields are in no fixed order."""
    info = open_dataset(str(data_dir), "folder")
    names = sorted(path.name for path in info.directory.iterdir())
    records = {split: list(info.records(split)) for split in info.ids}
    return (
        names,
        dataclasses.replace(info, directory=base.dataset_directory("", "folder")),
        records,
    )


@pytest.mark.full
def test_killed_at_any_time_it_ends_as_if_never_killed(tmp_path):
    make_folder(tmp_path / "src", images=80)
    named = ["--dataset=folder", f"--source={tmp_path / 'src'}"]
    # The server imports once; each of its children is a program of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.prepare_data"])

    def start(name):
        to = f"--data_dir={tmp_path / name}"
        child = context.Process(target=prepare_data.main, args=([*named, to],))
        child.start()
        return child

    start("warm").join()
    begin = time.monotonic()
    whole = start("whole")
    whole.join()
    seconds = time.monotonic() - begin
    assert whole.exitcode == 0
    expected = _contents_of(tmp_path / "whole")
    # The shortest first: a run that is faster than the whole one must be killed too.
    delays = sorted(np.random.default_rng(0).uniform(0, seconds, 12))
    codes = []
    for delay in delays:
        child = start("killed")
        child.join(delay)
        child.kill()
        child.join()
        codes.append(child.exitcode)
        if is_prepared(str(tmp_path / "killed"), "folder"):
            break
    assert -signal.SIGKILL in codes
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    directory = base.dataset_directory(tmp_path / "killed", "folder")
    assert _contents_of(tmp_path / "killed") == expected
    assert not list(directory.parent.glob("incomplete.*"))


def test_two_at_once_keep_what_the_first_prepared(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "src")
    other = make_folder(tmp_path / "other", images=7)
    checked = check.check_source

    def overtaken(root, *, by):
        """Prepares `root` while another run prepares `by`, which is faster."""
        data_dir = tmp_path / f"{by.name}_first"

        def check_source(data):
            monkeypatch.setattr(check, "check_source", checked)
            named = ["--dataset=folder", f"--source={by}", f"--data_dir={data_dir}"]
            prepare_data.main(named)
            return checked(data)

        monkeypatch.setattr(check, "check_source", check_source)
        source = registry.read_source("folder", str(root))
        return prepare_data.prepare(source, str(data_dir))

    text = overtaken(tmp_path / "src", by=tmp_path / "src")
    assert text.startswith("Already prepared in")
    with pytest.raises(ValueError, match="was made from other data"):
        overtaken(tmp_path / "src", by=other)
    info = open_dataset(str(tmp_path / "other_first"), "folder")
    assert len(info.ids["train"]) == 6
    capsys.readouterr()


def test_training_refuses_what_checking_refuses(tmp_path):
    """Data prepared by other means, without a labeled pixel for validation."""
    make_folder(tmp_path / "src")
    source = registry.read_source("folder", str(tmp_path / "src"))
    report = check.check_source(source)
    held_out = source.splits["val"][0].id
    present = report.present | {held_out: ()}
    warnings = ["folder: 2 images in two splits"]
    registry.prepare(source, present, str(tmp_path / "data"), warnings=warnings)
    config = config_for(tmp_path / "data", "folder")
    message = f"no labeled pixel in split 'val': the masks of {held_out} are void"
    with pytest.raises(ValueError, match=message):
        build.build_train(config, Streams())
    with pytest.raises(ValueError, match=message):
        build.build_eval(config)
    info = open_dataset(str(tmp_path / "data"), "folder")
    assert info.warnings == tuple(warnings)
    found = prepared_lib.check(info)
    assert any(message in problem for problem in found.problems)
    assert found.warnings == tuple(warnings)


def test_training_repeats_the_warnings_of_checking(tmp_path):
    root = make_folder(tmp_path / "src")
    (root / "val.txt").write_text("im00\n")
    content = (root / "images" / "im00.png").read_bytes()
    (root / "images" / "im01.png").write_bytes(content)
    named = ["--dataset=folder", f"--source={root}"]
    prepare_data.main([*named, f"--data_dir={tmp_path / 'data'}"])
    pipeline = build.build_train(config_for(tmp_path / "data", "folder"), Streams())
    (warning,) = pipeline.warnings
    assert "1 image in two splits, equal in every pixel: train: im01" in warning
