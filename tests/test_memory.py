"""What memory is free, under the limits of machine, control groups and process."""

import os
import pathlib
import subprocess
import sys
import textwrap
import types

import psutil
import pytest

from mpmc_jax import memory

ROOT = pathlib.Path(__file__).parent.parent


def test_what_is_free_is_not_more_than_the_machine_has():
    assert 0 < memory.available() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("lines", "folder", "names"),
    [
        (
            "0::/job/step",
            "",
            ("memory.max", "memory.current", "inactive_file"),
        ),
        (
            "9:name=systemd:/\n4:cpu,memory:/job/step",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_tightest_control_group_counts(lines, folder, names, tmp_path, monkeypatch):
    limit, usage, cache = names
    groups = tmp_path / "groups"
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(lines)
    root = groups / folder
    (root / "job" / "step").mkdir(parents=True)
    assert memory._left_in_cgroups() == []
    # A batch system limits the job, the step within it has no limit of its own.
    (root / "job" / limit).write_text("5000\n")
    (root / "job" / usage).write_text("3000\n")
    (root / "job" / "memory.stat").write_text(f"anon 2000\n{cache} 700\n")
    (root / "job" / "step" / limit).write_text("max\n")
    assert memory._left_in_cgroups() == [2700]
    assert memory.available() == 2700
    # A container sees its group as the root, under the host's name.
    (tmp_path / "own").write_text(lines.replace("/job/step", "/docker/1a2b"))
    for name in (limit, usage, "memory.stat"):
        (root / "job" / name).rename(root / name)
    assert memory._left_in_cgroups() == [2700]
    (tmp_path / "own").unlink()
    assert memory._left_in_cgroups() == []


def test_devices_that_know_their_memory_are_asked():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7})
    assert memory.of_devices([device, device]) == 14
    device = types.SimpleNamespace(memory_stats=lambda: None)
    assert abs(memory.of_devices([device, device]) - memory.available()) < 10**9


def test_files_that_claim_more_than_a_process_may_have_take_none_of_it(tmp_path):
    """In a process of its own, whose address space is limited."""
    script = """
        import io, json, pathlib, resource, sys, zipfile
        import numpy as np
        from mpmc_jax import memory
        from mpmc_jax.models.weights import files

        place = pathlib.Path(sys.argv[1])
        vms = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (vms + 2**29, vms + 2**29))
        assert memory.available() <= 2**29
        with zipfile.ZipFile(place / "lie.npz", "w") as archive:
            header = {"shape": (4 * 10**10,), "fortran_order": False, "descr": "<f4"}
            with archive.open("a.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
        with zipfile.ZipFile(place / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.compresslevel = 1
            header["shape"] = (2**28,)
            with archive.open("a.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(2**10):
                    file.write(bytes(2**20))
        (place / "bomb.pth").write_bytes((place / "bomb.npz").read_bytes())
        entry = {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}
        text = json.dumps({"a": entry}).encode()
        with (place / "holes.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 2**30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(place.iterdir()):
            try:
                files.read(path)
            except files.WeightsError as error:
                print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, grown = done.stdout.splitlines()
    for line, (name, said) in zip(
        lines,
        (
            ("bomb.npz", "holds 1.07 GB, and "),
            ("bomb.pth", "holds 1.07 GB, and "),
            ("holes.safetensors", "holds 1.07 GB, and "),
            ("lie.npz", "claims shape (40000000000,) of float32"),
        ),
        strict=True,
    ):
        assert line.startswith(f"{tmp_path / name}: ") and said in line
    assert int(grown) < 50_000  # kilobytes
