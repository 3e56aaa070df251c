"""Saves and restores a run with Orbax, verified against damaged files.

A checkpoint is the state's arrays plus a JSON item with the format version, what the
run is trained on, the data iterator's position and a checksum. Orbax restores flipped
bytes without an error, and cannot open a directory with a truncated metrics file. So
every restore is checked, steps are tried newest first, and a damaged one is set aside,
not deleted. The first save of a program is read back, because some paths and file
systems do not return what was written.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mpmc_jax import distributed
from mpmc_jax.atomic_write import write_text
from mpmc_jax.text import first_line
from mpmc_jax.training import agreement
from mpmc_jax.training.checkpoint import files, orbax_logging
from mpmc_jax.training.checkpoint.integrity import (
    CheckpointError,
    check_fit,
    checksum,
    describe,
    differences,
)
from mpmc_jax.training.state import TrainState, to_host
from mpmc_jax.training.workdir import complete, complete_data, flatten

_LOG = logging.getLogger(__name__)

FORMAT_VERSION = 4
_UNRANKED = -1.0  # lower than every score


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      state: as NumPy on the host.
      data_state: the data iterator's position.
      step: the checkpoint's step.
    """

    state: TrainState
    data_state: dict[str, Any]
    step: int


class CheckpointGoneError(CheckpointError):
    """The run, still training, deleted the checkpoint while it was read."""


def find(directory: Path, which: str) -> int:
    """Finds the step of a chosen checkpoint; changes no file.

    Args:
      directory: a run's checkpoints; the run may still be training.
      which: "last", "best" or a step.

    Raises:
      CheckpointError: there is none; the message lists what there is.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} holds no checkpoint: it does not exist")
    steps = files.steps(directory)
    step = -1
    if which == "last":
        step = max(steps, default=-1)
    elif which == "best":
        scores = {number: files.score(directory / str(number)) for number in steps}
        ranked = [(s, number) for number, s in scores.items() if s is not None]
        step = max(ranked, default=(_UNRANKED, -1))[1]
    elif which.isdecimal() and int(which) in steps:
        step = int(which)
    step = distributed.from_first(step)
    if step < 0:
        damaged = sorted(path.name for path in directory.glob("damaged-*"))
        aside = f"; set aside as damaged: {damaged}" if damaged else ""
        raise CheckpointError(
            f"{directory} holds no checkpoint {which!r}; steps there: "
            f"{steps or 'none'}{aside}; choose last, best or a step that is there"
        )
    return step


def read_run(directory: Path, step: int) -> dict[str, Any]:
    """Reads what the run was trained on, as it was given to `Checkpointer`.

    Raises:
      CheckpointError: the checkpoint is damaged or of another format version.
      CheckpointGoneError: it was deleted meanwhile.
    """
    with _reading(directory, step):
        return _read_meta(directory / str(step))["run"]


def read(directory: Path, step: int, like: TrainState) -> Restored:
    """Reads a checkpoint; changes no file.

    Args:
      directory: a run's checkpoints.
      step: one that is there.
      like: shapes and types of the state.

    Raises:
      CheckpointError: the checkpoint is damaged, of another format version, or its
        arrays do not fit `like`.
      CheckpointGoneError: it was deleted meanwhile.
    """
    with _reading(directory, step):
        return _restore(directory / str(step), like)


@contextlib.contextmanager
def _reading(directory: Path, step: int) -> Iterator[None]:
    folder = directory / str(step)
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # any damage
        others = [other for other in files.steps(directory) if other != step]
        if not folder.exists():
            raise CheckpointGoneError(
                f"{folder} was deleted while it was read; use another of {others}"
            ) from error
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {first_line(error)}; use "
            f"--checkpoint=STEP with another of {others or 'none'}"
        ) from error


def _read_meta(folder: Path) -> dict[str, Any]:
    meta = files.read_meta(folder)
    if (version := meta["format_version"]) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this program reads "
            f"{FORMAT_VERSION}; continue with the release that wrote it, or start "
            "a new --workdir"
        )
    return meta


def _restore(folder: Path, like: TrainState) -> Restored:
    meta = _read_meta(folder)
    check_fit(folder, meta["leaves"], describe(like))
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    state = files.read(folder, state=ocp.args.StandardRestore(target))["state"]
    if checksum(state) != meta["checksum"]:
        raise ValueError("its checksum differs: bytes changed on disk")
    return Restored(state, meta["data_state"], int(folder.name))


class Checkpointer:
    """Keeps the newest `keep` checkpoints of a run and the best by its score.

    Args:
      directory: a directory for checkpoints alone.
      keep: how many of the newest to keep, at least 1.
      run: what the run is trained on, as JSON values; every checkpoint stores it.

    Raises:
      CheckpointError: the directory cannot be written, or Orbax cannot use its path.
    """

    def __init__(
        self, directory: Path, keep: int = 2, run: Mapping[str, Any] | None = None
    ) -> None:
        orbax_logging.silence_noise()
        self._directory = directory.absolute()
        self._keep = keep
        self._run = json.loads(json.dumps(run or {}))
        self._read_back = False
        if keep < 1:
            raise CheckpointError(f"train.keep={keep}: at least 1 checkpoint is kept")
        with agreement.failing_together():
            files.check_path(self._directory)
            files.check_writable(self._directory)
            if distributed.is_first():
                files.set_aside_unreadable(self._directory)
                files.remove_rest(self._directory)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def metric(metrics: dict[str, float]) -> float:
            return metrics.get(files.SCORE, _UNRANKED)

        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(self._keep),
                checkpoint_managers.BestN(get_metric_fn=metric, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=metric,
            best_mode="max",
            create=False,
            save_interval_steps=1,
            todelete_subdir=files.DELETED,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def save(
        self, state: TrainState, data_state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Saves in the background, without a score; a step that is saved already stays.

        Args:
          state: one copy of the state, on the host or a device.
          data_state: the data iterator's position at this step.
          wait: return only when it is on disk.

        Raises:
          CheckpointError: this save failed, or the previous one.
        """
        arrays = to_host(state)
        step = int(arrays.step)
        if distributed.is_first():
            files.remove_deleted(self._directory)
        if step in self._manager.all_steps():
            self.wait()
            return
        meta = files.sealed(
            {
                "format_version": FORMAT_VERSION,
                "run": self._run,
                "data_state": data_state,
                "leaves": describe(arrays),
                "checksum": checksum(arrays),
            }
        )
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
                ),
                metrics={files.SCORE: _UNRANKED},
                force=True,
            )
        if wait or not self._read_back:
            self.wait()
        if not self._read_back:
            self._check_saved(step, arrays)

    def _check_saved(self, step: int, arrays: TrainState) -> None:
        """Reads the first save back; otherwise a failure would surface only at restart.

        Raises:
          CheckpointError: it cannot be read.
        """
        folder, why = self._directory / str(step), ""
        if distributed.is_first():
            try:
                _restore(folder, arrays)
            except Exception as error:  # any error makes the save useless
                why = first_line(error)
        if not distributed.all_agree(not why):
            raise CheckpointError(
                f"{folder} was saved, but it cannot be read back "
                f"({why or 'by process 0'}): use a --workdir of another name, or on "
                "another file system"
            )
        self._read_back = True

    def wait(self) -> None:
        """Waits until the save in the background is on disk.

        Raises:
          CheckpointError: the save failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def rank(self, step: int, score: float | None) -> None:
        """Stores the score of a saved step, by which the best is chosen and kept.

        The previous best checkpoint stays until the next save.

        Args:
          step: a step that is saved, or being saved.
          score: score of its evaluation in process 0; None ranks lowest.

        Raises:
          CheckpointError: the save failed, or the score cannot be written.
        """
        self.wait()
        with self._writing():
            if distributed.is_first() and score is not None:
                metrics = files.metrics_file(self._directory / str(step))
                write_text(metrics, json.dumps({files.SCORE: score}))
            distributed.barrier("a checkpoint is ranked")
            self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Explains a failure, maybe that of the previous save in the background."""
        try:
            yield
        except Exception as error:  # TensorStore's are ValueErrors
            if (lost := files.of_another_process(error)) is not None:
                raise lost  # noqa: B904  it is the cause of this error already
            raise CheckpointError(
                f"saving to {self._directory} failed: {files.reason(error)}; the "
                "checkpoints there are intact: free space or fix permissions, then "
                "run the same command again"
            ) from error

    def restore_latest(self, like: TrainState) -> Restored | None:
        """Restores the newest intact checkpoint; None if no step was ever saved.

        Newer ones that are damaged are set aside.

        Raises:
          CheckpointError: a checkpoint of another format version or run, one whose
            arrays do not fit `like`, or no intact one among several.
        """
        while (step := self._newest()) >= 0:
            folder = self._directory / str(step)
            restored, why = None, "another process could not read it"
            with agreement.failing_together():
                try:
                    self._check_run(folder)
                    restored = _restore(folder, like)
                except CheckpointError:
                    raise
                except Exception as error:  # any damage must not end the run
                    why = first_line(error)
            if distributed.all_agree(restored is not None):
                return restored
            self._manager.close()
            if distributed.is_first():
                files.set_aside(folder, why)
            distributed.barrier("a damaged checkpoint is set aside")
            self._manager = self._open()
        if any(self._directory.glob("damaged-*")):
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read; those set aside as "
                "damaged-* are still there: restore one from a copy, or start again "
                "with a new --workdir"
            )
        return None

    def _newest(self) -> int:
        """Returns the newest step that process 0 sees, -1 if there is none.

        Files may become visible to other processes later.
        """
        return distributed.from_first(max(self._manager.all_steps(), default=-1))

    def _check_run(self, folder: Path) -> None:
        run = _read_meta(folder)["run"]
        there, now = (
            flatten(
                each
                | {"config": complete(each.get("config", {}))}
                | {"data": complete_data(each.get("data", {}))}
            )
            for each in (run, self._run)
        )
        if lines := differences(there, now):
            raise CheckpointError(
                f"{folder} is of a run with other settings or data:\n"
                + "\n".join(lines)
                + "\nUse a new --workdir, or the same settings and data to resume "
                "that run."
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes; its failure is only logged if an error is already propagating."""
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            _LOG.error("%s", failed)

    def close(self) -> None:
        """Waits for the save in the background, and closes the directory.

        Raises:
          CheckpointError: the save failed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()
            if distributed.is_first():
                files.remove_deleted(self._directory)
