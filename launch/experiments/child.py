"""Runs a module as `python -m MODULE ...` does, and ends with its parent process.

python -m launch.experiments.child launch.train --config=... --workdir=...
"""

import ctypes
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def main() -> None:
    """Asks the system to kill this process with its parent, then runs the module."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
