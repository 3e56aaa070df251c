"""What every program does first."""

import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import synthetic
from launch import (
    check_data,
    cli,
    convert_weights,
    evaluate,
    predict,
    prepare_data,
)
from launch.bench import __main__ as bench
from launch.bench import smoke_matrix, topologies
from launch.experiments import __main__ as experiments
from mpmc_jax.experiments import config_checks
from mpmc_jax.paths import as_path
from tests.support.programs import ENVIRONMENT, ROOT

# Twice the same 50 MB, as a step's temporaries: prints the second round's page faults,
# of a process for each line of code before them.
ROUNDS = """
import ctypes, os, resource, sys
from launch import cli
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    block = ctypes.c_void_p(libc.malloc(50_000_000))
    ctypes.memset(block, 1, 50_000_000)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for before in sys.argv[1:]:
    if os.fork() == 0:
        exec(before)
        first = use()
        print(use() - first, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_is_kept():
    chosen = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX")
    plain = {k: v for k, v in ENVIRONMENT.items() if k not in chosen}

    with_driver = "cli._NVIDIA_DRIVER = cli.Path('/dev/null'); cli.keep_memory()"
    kept = ("cli.keep_memory()", f"os.environ['JAX_PLATFORMS'] = 'cpu'; {with_driver}")
    not_kept = (
        "",
        f"os.environ['JAX_PLATFORMS'] = ''; {with_driver}",
        # Who chose for themselves is left alone.
        "os.environ['MALLOC_ARENA_MAX'] = '8'; cli.keep_memory()",
    )
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, *kept, *not_kept],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    faults = [int(line) for line in done.stdout.splitlines()]
    assert len(faults) == len(kept) + len(not_kept)
    assert max(faults[:2]) < 100 < 10_000 < min(faults[2:])


def test_too_little_memory_says_what_to_turn():
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 28155077248 bytes."
    said = r"28155077248(.|\n)*train\.accumulation"
    with pytest.raises(SystemExit, match=said), cli.user_errors():
        raise jax.errors.JaxRuntimeError(message)
    with pytest.raises(jax.errors.JaxRuntimeError), cli.user_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect keeps its traceback")
    said = r"memory is full: Unable to allocate 149(.|\n)*train\.accumulation"
    with pytest.raises(SystemExit, match=said), cli.user_errors():
        raise MemoryError("Unable to allocate 149. GiB for an array")


def test_a_reader_that_has_enough_is_no_error():
    code = "from launch import cli\nwith cli.user_errors():\n  print('y\\n' * 500_000)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("program", [prepare_data, check_data])
def test_an_unknown_data_set_ends_in_one_line(program):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--dataset=foldr", "--source=x"])
    message = str(stopped.value.code)
    assert message.startswith("error: unknown data set 'foldr'; did you mean 'folder'?")
    assert len(message.splitlines()) == 1


def test_the_home_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert as_path("--workdir", "~/runs") == Path("/home/me/runs")
    assert as_path("--workdir", "a~b/c,d") == Path("a~b/c,d")
    assert as_path("--workdir", "~nobody-of-that-name/x").parts[0].startswith("~")


def test_settings_that_name_files_mean_the_home_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = synthetic.get_config("lists=~/lists,split=7")
    config.data.data_dir = "~/data"
    config_checks.expand_paths(config)
    assert config.data.data_dir == "/home/me/data"
    assert config.data.labeled_ids == "/home/me/lists/7/labeled.txt"
    assert config.data.unlabeled_ids == "/home/me/lists/7/unlabeled.txt"
    assert config.model.pretrained == ""
    config.model.pretrained = "gs://bucket/resnet.safetensors"
    with pytest.raises(ValueError, match=r"--config\.model\.pretrained=gs://.* mount"):
        config_checks.expand_paths(config)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (check_data, ["--dataset=folder", "--source=URL"]),
        (check_data, ["--dataset=folder", "--data_dir=URL"]),
        (prepare_data, ["--dataset=folder", "--source=URL"]),
        (prepare_data, ["--dataset=synthetic", "--data_dir=URL"]),
        (evaluate, ["--workdir=URL"]),
        (evaluate, ["--weights=URL", "--dataset=voc"]),
        (evaluate, ["--weights=x", "--dataset=voc", "--data_dir=URL"]),
        (predict, ["--workdir=URL", "--input=.", "--output=x"]),
        (predict, ["--workdir=x", "--input=URL", "--output=x"]),
        (predict, ["--workdir=x", "--input=.", "--output=URL"]),
        (experiments, ["--name=curves", "--output=URL", "x"]),
        (experiments, ["--name=curves", "--output=x", "URL"]),
        (convert_weights, ["--input=URL", "--output=x.safetensors"]),
        (convert_weights, ["--input=x", "--output=URL"]),
        (bench, ["--what=data", "--images=0", "--data_dir=URL"]),
        (bench, ["--profile=URL"]),
        (smoke_matrix, ["--output=URL"]),
        (topologies, ["--results=URL"]),
    ],
)
def test_no_path_may_be_a_url(program, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/x.png"
    with pytest.raises(SystemExit) as stopped:
        program.main([argument.replace("URL", url) for argument in arguments])
    message = str(stopped.value.code)
    assert message.startswith("error: ") and f"={url} is a URL" in message
    assert "mount it" in message and len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())
