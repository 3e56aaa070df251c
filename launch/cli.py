"""What every command line shares: parser, one-line errors, compiled programs kept."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from mpmc_jax.data import registry
from mpmc_jax.data.lists import printable
from mpmc_jax.data.source import Source
from mpmc_jax.paths import as_path
from mpmc_jax.training.checkpoint.integrity import CheckpointError
from mpmc_jax.training.loop import Interrupted, NonFiniteError
from mpmc_jax.training.workdir import WorkdirError

# What a user can mend; anything else is a defect, and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, CheckpointError, WorkdirError, NonFiniteError)

# Status of a run that a signal stopped, saved: the same command goes on (EX_TEMPFAIL).
STOPPED = 75

_SMALLER = (
    "The device's memory is too small for this step. In this order, until it fits: "
    "model.dtype=bfloat16 (GPU, TPU), model.remat=True, train.accumulation=2 or more, "
    "a smaller data.crop or train.batch_size; launch.bench --what=fits measures it."
)

# glibc's malloc.h: no trimming, no mapping of single blocks, one arena.
_KEPT = {-1: -1, -4: 0, -8: 1}


def parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m launch.<verb>`; --help shows the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m launch.{verb}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_source(arguments: argparse.ArgumentParser) -> None:
    """The arguments that name a data set which is not prepared yet."""
    arguments.add_argument("--dataset", required=True, choices=list(registry.DATASETS))
    arguments.add_argument(
        "--source",
        default="",
        metavar="DIR",
        help="its folder, laid out as its authors publish it; `synthetic` has none",
    )
    arguments.add_argument(
        "--classes",
        default="",
        metavar="A,B",
        help="class names, for `folder` without a classes.json",
    )


def add_run(
    arguments: argparse.ArgumentParser,
    checkpoint: str = "best",
    *,
    required: bool = True,
) -> None:
    """The arguments that name a run, and its checkpoint."""
    arguments.add_argument("--workdir", required=required, help="directory of the run")
    arguments.add_argument(
        "--checkpoint", default=checkpoint, help="best, last or a step"
    )


def add_data_dir(arguments: argparse.ArgumentParser) -> None:
    """The argument that finds a run's data set where it lies now."""
    arguments.add_argument(
        "--data_dir", default="", help="where prepared data sets lie: the run's"
    )


def read_source(args: argparse.Namespace) -> Source:
    """The source that the arguments name.

    Raises:
      ValueError: class names for a data set that has its own; an empty one; or see
        `as_path`.
      FileNotFoundError: its folder is missing or empty.
    """
    names = tuple(args.classes.split(",")) if args.classes else ()
    if "" in names:
        raise ValueError(f"--classes={args.classes}: a name between commas is empty")
    source = str(as_path("--source", args.source)) if args.source else ""
    return registry.read_source(args.dataset, source, names)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line; its status is 1 on what a user can mend."""
    try:
        yield
        if sys.stdout is not None:  # closed before the program began, as by `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough, as in `| head`
        _give_up_output()
        sys.exit(128 + signal.SIGPIPE)
    except _USER_ERRORS as error:
        _give_up_output()
        lines = printable(error, keep="\n")
        sys.exit(f"error: {lines}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except MemoryError as error:
        sys.exit(f"error: this machine's memory is full: {error}\n{_SMALLER}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {error}\n{_SMALLER}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _give_up_output() -> None:
    """Lets Python end without a second error where stdout cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_memory() -> None:
    """Lets the C library keep what is freed, and take it from one place.

    XLA on a CPU asks for all of a step's temporaries at every step; given back to the
    system in between, they cost a fifth of the step in page faults; kept, they may
    take twice their room. To be called before JAX begins its threads. Does nothing
    without glibc, or where MALLOC_ARENA_MAX says what is wanted.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        for parameter, value in _KEPT.items():
            mallopt(parameter, value)


def setup_runtime() -> None:
    """What every program that computes does first."""
    keep_memory()
    keep_compiled_programs()


def keep_compiled_programs() -> None:
    """Turns JAX's compilation cache on, unless a place for it was already chosen.

    Evaluation compiles a program a distinct image size; the next run finds them.
    JAX_COMPILATION_CACHE_DIR chooses another place; otherwise it is mpmc_jax in
    XDG_CACHE_HOME or ~/.cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(caches, "mpmc_jax")
        jax.config.update("jax_compilation_cache_dir", str(cache))
