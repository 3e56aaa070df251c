"""Result files are whole or not there, and JSON is valid whatever the values."""

import json
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from mpmc_jax import atomic_write


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("before")
    (tmp_path / ".result.json.part").write_text("what a killed process left" * 9)
    atomic_write.write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["result.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_has_null_for_what_is_no_number():
    value = {"a": [float("nan"), 1.5], "b": {"c": (np.inf, -np.inf, np.float64(2))}}
    text = atomic_write.to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": [None, None, 2.0]},
    }


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(b"before")
    code = (
        "import pathlib, resource, sys\n"
        "from mpmc_jax import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    atomic_write.write_bytes(pathlib.Path(sys.argv[1]), bytes(5000))\n"
        "except OSError as error:\n"
        "    print(error.filename, error.strerror)\n"
    )
    assert resource.RLIMIT_FSIZE  # Of POSIX alone, as the program's locks are.
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == [str(path), "File too large\n"]
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["result.bin"]


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        atomic_write.write_text(tmp_path / "gone" / "x.txt", "")
    assert raised.value.filename == str(tmp_path / "gone" / "x.txt")


def test_writers_of_one_file_do_not_mix(tmp_path):
    """Each file that a reader sees is one writer's, in full."""
    path = tmp_path / "result"
    contents = [bytes([number]) * 200_000 for number in range(4)]
    atomic_write.write_bytes(path, contents[0])

    def write(content):
        for _ in range(20):
            atomic_write.write_bytes(path, content)

    writers = [threading.Thread(target=write, args=(each,)) for each in contents]
    for each in writers:
        each.start()
    seen = set()
    while any(each.is_alive() for each in writers):
        seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert os.listdir(tmp_path) == ["result"]
