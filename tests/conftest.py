"""The strict JAX of every test; set before anything imports jax.

Tests run on four CPU devices, implicit rank promotion raises, and (pyproject.toml)
every warning is an error. Programs started by tests inherit all of it, and share one
compilation cache that lasts as long as the session.
"""

import gc
import os
import shutil
import sys
import tempfile

import pytest

from tests.support import x64
from tests.support.browser import chromium
from tests.support.xla import device_flags

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _WORKER:
    # Workers inherit it, so that what one compiled no other compiles again.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mpmc_jax_tests_")

# Hundreds of programs are started, and none of them need parse the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tracing makes many objects, few of them garbage.
gc.set_threshold(20_000, 10, 50)

os.environ["XLA_FLAGS"] = device_flags(4)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Without the source lines of operations, XLA compiles a tenth faster.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"


_LONGEST = (
    "test_the_quick_start_reaches_its_mark",
    "test_the_site_builds_with_its_notebooks",
)


def pytest_collection_modifyitems(items):
    """The longest tests go first, so that no worker ends with one of them alone."""
    items.sort(key=lambda item: item.name not in _LONGEST)


def pytest_collection_finish():
    """What all tests share stays; the garbage collector need not visit it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    if not _WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped():
    """A process may map only so much memory, and programs take their share."""
    yield
    x64.end()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def browser():
    """A browser that opens pages."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session", autouse=True)
def _no_tensorflow():
    yield
    # tensorboardX imports torch where it is installed.
    assert "tensorflow" not in sys.modules, "the package must not import tensorflow"
