"""Runs a piece of test in a process of its own that has float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_x64(code: str, timeout: float = 1200) -> dict:
    """What `code` prints as a JSON object on its last line, run in float64.

    The process has the strict JAX of `conftest`, warnings are errors, and both the
    package and `tests` can be imported.

    Raises:
      AssertionError: the process failed; carries the end of its output.
    """
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads(result.stdout.splitlines()[-1])


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
