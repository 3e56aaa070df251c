"""What every program does first."""

import signal
import subprocess
import sys

import jax
import pytest
from programs import ENVIRONMENT, ROOT

from launch import cli

# Twice the same 50 MB, as a step's temporaries: prints the second round's page faults.
ROUNDS = """
import ctypes, resource
from launch import cli
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    block = ctypes.c_void_p(libc.malloc(50_000_000))
    ctypes.memset(block, 1, 50_000_000)
    libc.free(block)
use()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_is_kept():
    chosen = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX")
    plain = {k: v for k, v in ENVIRONMENT.items() if k not in chosen}

    def faults(before, **environment):
        done = subprocess.run(
            [sys.executable, "-c", ROUNDS.format(before=before)],
            cwd=ROOT,
            env=plain | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("cli.keep_memory()") < 100 < 10_000 < faults("")
    # Who chose for themselves is left alone.
    assert faults("cli.keep_memory()", MALLOC_ARENA_MAX="8") > 10_000


def test_too_little_memory_says_what_to_turn():
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 28155077248 bytes."
    said = r"28155077248(.|\n)*train\.accumulation"
    with pytest.raises(SystemExit, match=said), cli.user_errors():
        raise jax.errors.JaxRuntimeError(message)
    with pytest.raises(jax.errors.JaxRuntimeError), cli.user_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect keeps its traceback")


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
