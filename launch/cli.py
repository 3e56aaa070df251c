"""Shared by all programs: parser, one-line errors, compilation cache, memory."""

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
from mpmc_jax.data.source import Source
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable
from mpmc_jax.training.checkpoint.integrity import CheckpointError
from mpmc_jax.training.loop import Interrupted, NonFiniteError
from mpmc_jax.training.workdir import WorkdirError

# Errors that a user can fix; any other is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, CheckpointError, WorkdirError, NonFiniteError)

# Exit status of a run that a signal stopped after saving: the same command resumes it
# (EX_TEMPFAIL).
STOPPED = 75

_MEMORY_ADVICE = (
    "The device's memory is too small for this step. Tuning order, until it fits: "
    "model.dtype=bfloat16 (GPU, TPU), model.remat=cheap or all, train.accumulation=2 "
    "or more, a smaller data.crop or train.batch_size; launch.train --fit finds out."
)

# glibc's malloc.h: no trimming, no mapping of single blocks, one arena.
_MALLOC_OPTIONS = {-1: -1, -4: 0, -8: 1}
# There where the driver is loaded.
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


def parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of `python -m launch.<verb>`; --help shows the docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m launch.{verb}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_source(arguments: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a data set which is not prepared yet."""
    arguments.add_argument(
        "--dataset",
        required=True,
        type=_known_dataset,
        metavar="NAME",
        help=", ".join(registry.DATASETS),
    )
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
    arguments.add_argument(
        "--unlabeled",
        default="",
        metavar="PATH",
        help="more images without masks, for `folder`: a folder (with subfolders), a "
        "quoted pattern such as 'photos/**/*.jpg', or a text file of paths",
    )


def _known_dataset(name: str) -> str:
    """Ends the program with one line (status 1) if the data set is unknown."""
    with user_errors():
        registry.find(name)
    return name


def add_run(
    arguments: argparse.ArgumentParser,
    checkpoint: str = "best",
    *,
    required: bool = True,
) -> None:
    """Adds the arguments that name a run and its checkpoint."""
    arguments.add_argument("--workdir", required=required, help="directory of the run")
    arguments.add_argument(
        "--checkpoint", default=checkpoint, help="best, last or a step"
    )


def add_data_dir(arguments: argparse.ArgumentParser) -> None:
    """Adds the argument for a run's data set that was moved."""
    arguments.add_argument(
        "--data_dir",
        default="",
        help="folder of prepared data sets (the run's)",
    )


def parse_scales(text: str) -> tuple[float, ...]:
    """Returns the factors that --scales lists; () for none.

    Raises:
      ValueError: one of them is not a number.
    """
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        raise ValueError(
            f"--scales={text}: numbers separated by commas, such as 0.5,1"
        ) from None


def class_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the class names of --classes; () if it is not given.

    Raises:
      ValueError: a name is empty.
    """
    names = tuple(args.classes.split(",")) if args.classes else ()
    if "" in names:
        raise ValueError(f"--classes={args.classes}: a name between commas is empty")
    return names


def read_source(args: argparse.Namespace, classes: tuple[str, ...]) -> Source:
    """Opens the source that the arguments name.

    Args:
      args: the arguments of `add_source`.
      classes: see `registry.read_source`.

    Raises:
      ValueError: see `registry.read_source` and `as_path`.
      FileNotFoundError: the source's folder is missing or empty.
    """
    source = str(as_path("--source", args.source)) if args.source else ""
    unlabeled = str(as_path("--unlabeled", args.unlabeled)) if args.unlabeled else ""
    return registry.read_source(args.dataset, source, classes, unlabeled)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line where a user can fix the error (status 1)."""
    try:
        yield
        if sys.stdout is not None:  # closed before the program began, as by `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # the reader was closed, as in `| head`
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except _USER_ERRORS as error:
        _discard_output()
        lines = printable(error, keep="\n")
        sys.exit(f"error: {lines}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except MemoryError as error:
        sys.exit(f"error: this machine's memory is full: {error}\n{_MEMORY_ADVICE}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {error}\n{_MEMORY_ADVICE}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _discard_output() -> None:
    """Lets Python exit without a second error where stdout cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_memory() -> None:
    """Lets the C library keep freed memory, and allocate from a single arena.

    XLA on a CPU allocates all of a step's temporaries at every step. Returned to the
    system in between, they cost a fifth of the step in page faults; kept, they may take
    twice their size. Call it before JAX starts its threads. Does nothing without glibc,
    where MALLOC_ARENA_MAX is set, or where JAX may take an NVIDIA GPU: its temporaries
    are on the device, and compilation is slower in a single arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not _NVIDIA_DRIVER.exists()
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ and on_cpu:
        for parameter, value in _MALLOC_OPTIONS.items():
            mallopt(parameter, value)


def setup_runtime() -> None:
    """Sets up memory and the compilation cache; called first where JAX is used."""
    keep_memory()
    enable_compilation_cache()


def enable_compilation_cache() -> None:
    """Turns on JAX's compilation cache, unless its directory is already set.

    Evaluation compiles one program per distinct image size, which the next run reuses.
    The directory is JAX_COMPILATION_CACHE_DIR, or mpmc_jax in XDG_CACHE_HOME or
    ~/.cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(caches, "mpmc_jax")
        jax.config.update("jax_compilation_cache_dir", str(cache))
