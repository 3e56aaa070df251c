"""One run at a time in a workdir, on one machine or on several that share its files.

The lock is a file that its holder touches every few seconds (filelock's lease). On the
same machine a dead holder is detected at once; on another machine it counts as dead
when its file stays untouched for LEASE_SECONDS. Reading a workdir needs no lock.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from mpmc_jax import distributed
from mpmc_jax.atomic_write import write_json
from mpmc_jax.training import agreement
from mpmc_jax.training.workdir import WorkdirError, make

_LOG = logging.getLogger(__name__)

LOCK = ".lock"
HOLDER = ".lock.json"
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 5.0
# File systems of several machines show a new file late.
_VISIBLE_SECONDS = 30.0


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a workdir, which is made if it does not exist.

    Process 0 of a run holds the lock for all of them.

    Raises:
      WorkdirError: another run holds it, or the directory cannot be written.
      SharedError: the same in a run of several processes; or one of them does not see
        the directory of process 0.
    """
    lease = filelock.SoftFileLease(
        workdir / LOCK,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=HEARTBEAT_SECONDS,
        thread_local=False,
        on_compromise=lambda lost: _end(workdir, lost.reason),
    )
    with contextlib.ExitStack() as stack:
        with agreement.failing_together():
            if distributed.is_first():
                stack.callback(_release, lease)
                _acquire(lease, workdir)
        _check_visible(workdir / LOCK, lease.token or "")
        yield


def _acquire(lease: filelock.SoftFileLease, workdir: Path) -> None:
    make(workdir)
    path = workdir / LOCK
    try:
        with contextlib.suppress(filelock.Timeout):
            lease.acquire(timeout=0.5, poll_interval=0.1)
        if not lease.is_locked:
            _wait(lease, path)
        write_json(workdir / HOLDER, _myself())
    except filelock.Timeout as error:
        raise WorkdirError(
            f"--workdir={workdir} is in use by another run: {_holder(workdir)}; stop "
            "that run, or choose another --workdir"
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be written: {error.strerror}; free space, or fix the "
            "permissions"
        ) from error


def _wait(lease: filelock.SoftFileLease, path: Path) -> None:
    """Takes the lock once its holder has shown no heartbeat for LEASE_SECONDS.

    Raises:
      Timeout: the holder's heartbeat came.
    """
    first, begin = _touched(path), time.monotonic()
    _LOG.info(
        "%s: another run held it (%s); waiting for its heartbeat, %.0f s at most",
        path,
        _holder(path.parent),
        LEASE_SECONDS,
    )
    lease.acquire(
        timeout=LEASE_SECONDS + 4 * HEARTBEAT_SECONDS,
        poll_interval=HEARTBEAT_SECONDS / 5,
        cancel_check=lambda: _touched(path) not in (first, None),
    )
    _LOG.info("no heartbeat for %.0f s: taking the lock", time.monotonic() - begin)


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _myself() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone()
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": now.isoformat(timespec="seconds"),
    }


def _holder(workdir: Path) -> str:
    try:
        found = json.loads((workdir / HOLDER).read_bytes())
        return (
            f"process {found['process']} on {found['host']}, started {found['started']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "it did not record who it is"


def _check_visible(path: Path, token: str) -> None:
    """Checks that all processes of a run see the same directory."""
    if distributed.is_alone():
        return
    token = distributed.gather_text(token)[0]
    with agreement.failing_together():
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not _contains(path, token):
            if time.monotonic() > deadline:
                raise WorkdirError(
                    f"{path.parent} on {socket.gethostname()} is not the --workdir of "
                    "process 0: give all processes the same directory, on a file "
                    "system that they share"
                )
            time.sleep(0.5)


def _contains(path: Path, token: str) -> bool:
    try:
        return token in path.read_text()
    except (OSError, ValueError):
        return False


def _release(lease: filelock.SoftFileLease) -> None:
    # If this fails, the lease expires by itself.
    with contextlib.suppress(OSError):
        lease.release()


def _end(workdir: Path, reason: str) -> None:
    """Ends the process at once: two runs in one workdir would corrupt each other."""
    print(
        f"error: the lock of --workdir={workdir} was lost ({reason}): this process "
        "stalled for too long, its files could not be reached, or the directory "
        "was removed; what the newest checkpoint holds is kept",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
