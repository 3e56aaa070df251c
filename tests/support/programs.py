"""Programs run as a user runs them, on a network that trains in seconds."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.xla import QUICK

ROOT = Path(__file__).parent.parent.parent
# A network and crops small enough to train in seconds.
SMALL = (
    "--config.model.width=8",
    "--config.data.crop=49",
    "--config.train.batch_size=4",
    "--config.train.steps=6",
    "--config.train.eval_every=3",
    "--config.train.checkpoint_every=2",
    "--config.train.log_every=1",
)
CONFIG = (
    "configs/synthetic.py:method=unimatch,mpmc=recommended,backbone=resnet18,split=4"
)
# One device, as on a user's machine. In one arena of memory, as `cli.keep_memory` has
# it, a program compiles for a quarter longer; only long runs win that back.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": " ".join(QUICK),
    "MALLOC_ARENA_MAX": "8",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


def start(*arguments, output=subprocess.PIPE, below=(), cwd=ROOT, **environment):
    """A program in a process, as an argument of the command `below` if there is one."""
    # A shell's background jobs ignore Ctrl-C, and what they start would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [*below, sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_code(code, *arguments):
    """Python code in a process, which goes on as its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, text):
    """Reads what a process says up to a line with `text`."""
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {''.join(said)[-4000:]}")


def run(*arguments, fails=False, **environment):
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=1200)
    assert (process.returncode != 0) == fails, output[-4000:]
    return output


def free_address():
    """HOST:PORT that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def read_metrics(workdir):
    """The lines of a run's metrics.jsonl."""
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
