"""Runs a module as `python -m MODULE ...` does, with the tests' tiny networks.

python -m tests.support.small_program launch.train --config=... --workdir=...
"""

import importlib
import runpy
import sys

if __name__ == "__main__":
    importlib.import_module("tests.support.tiny")  # registers them
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
