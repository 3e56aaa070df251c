"""The strict JAX of every test; set before anything imports jax.

Tests run on four CPU devices, implicit rank promotion raises, and (pyproject.toml)
every warning is an error. Programs started by tests inherit all of it, and share one
compilation cache that lasts as long as the session.
"""

import os
import shutil
import sys
import tempfile

import pytest

_COMPILATION_CACHE = tempfile.mkdtemp(prefix="mpmc_jax_tests_")

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILATION_CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="session", autouse=True)
def _session():
    yield
    shutil.rmtree(_COMPILATION_CACHE, ignore_errors=True)
    loaded = {"tensorflow", "torch"} & sys.modules.keys()
    assert not loaded, f"the tests imported {sorted(loaded)}; the package must not"
