"""Runs pieces of tests in a process that has float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Runs the code of each line, and answers with what it printed and its traceback.
_SERVER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    printed, failed = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {})
    except Exception:
        failed = traceback.format_exc()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    print(json.dumps([printed.getvalue(), failed]), flush=True)
"""


# By its XLA flags; kept for a test module, as what it imports takes seconds.
_SERVERS: dict[str, subprocess.Popen] = {}


def _server() -> subprocess.Popen:
    flags = os.environ["XLA_FLAGS"]
    if flags not in _SERVERS:
        _SERVERS[flags] = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _SERVER],
            env=os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    return _SERVERS[flags]


def end() -> None:
    """Ends the processes that were started."""
    while _SERVERS:
        _, server = _SERVERS.popitem()
        with server:
            pass


def run_x64(code: str) -> dict:
    """What `code` prints as a JSON object on its last line, run in float64.

    The process has the strict JAX of `conftest`, warnings are errors, and both the
    package and `tests` can be imported.

    Raises:
      AssertionError: the code failed; carries the end of its traceback.
    """
    server = _server()
    print(json.dumps(code), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"the process ended with status {server.wait()}"
    printed, failed = json.loads(answer)
    assert not failed, printed[-2000:] + failed[-6000:]
    return json.loads(printed.splitlines()[-1])


def call_x64(module: str, call: str):
    """What a function of a test module returns, called in float64.

    Args:
      module: a test module, such as "tests.training.test_parity".
      call: the call, as text.
    """
    return run_x64(
        "import json, warnings\n"
        "warnings.filterwarnings('ignore', message='.*load_module')\n"
        f"import {module} as t\n"
        f"print(json.dumps({{'found': t.{call}}}))"
    )["found"]
