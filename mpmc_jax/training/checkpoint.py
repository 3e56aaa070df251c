"""Saving and restoring a run with Orbax, safe against files.

A checkpoint is the state's arrays plus a JSON item with the format version, the data
iterator's position and a checksum. Orbax restores flipped bytes without a word, and
cannot open a directory with a truncated metrics file; so every restore is checked,
steps are tried newest first, and a damaged one is set aside, not deleted.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mpmc_jax.atomic_write import write_text
from mpmc_jax.training import checkpoint_files as files
from mpmc_jax.training import quiet, together
from mpmc_jax.training.integrity import (
    CheckpointError,
    check_fit,
    checksum,
    describe,
)
from mpmc_jax.training.state import TrainState, to_host

_LOG = logging.getLogger(__name__)

FORMAT_VERSION = 3
SCORE = "score"
_UNRANKED = -1.0  # below every score


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      state: as NumPy on the host.
      data_state: the data iterator's position.
      step: the checkpoint's step.
    """

    state: TrainState
    data_state: dict[str, Any]
    step: int


class Checkpointer:
    """Keeps the newest `keep` checkpoints of a run and the best by its score.

    Args:
      directory: theirs alone.
      keep: how many of the newest, at least 1.
      read_only: change nothing there, so that a run under way may be looked at.

    Raises:
      CheckpointError: the directory cannot be written, or is not there to be read.
    """

    def __init__(
        self, directory: Path, keep: int = 2, *, read_only: bool = False
    ) -> None:
        quiet.silence_failures()
        self._directory = directory.absolute()
        self._keep = keep
        self._read_only = read_only
        if keep < 1:
            raise CheckpointError(f"train.keep={keep}: at least 1 checkpoint is kept")
        if not read_only:
            files.check_writable(self._directory)
            if together.is_first():
                files.set_aside_unreadable(self._directory)
            together.meet("unreadable checkpoints are set aside")
        elif not directory.is_dir():
            raise CheckpointError(f"{directory} holds no checkpoint: it does not exist")
        try:
            self._manager = self._open()
        except ValueError as error:
            raise CheckpointError(
                f"{directory} cannot be opened ({files.first_line(error)}); "
                "`launch.train` on this run sets damaged checkpoints aside"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        def metric(metrics: dict[str, float]) -> float:
            return metrics.get(SCORE, _UNRANKED)

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
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
        )
        if not self._read_only:
            return ocp.CheckpointManager(self._directory, options=options)
        with quiet.no_warnings():  # Orbax warns that reading does not write.
            return ocp.CheckpointManager(self._directory, options=options)

    def save(
        self, state: TrainState, data_state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Saves in the background, without a score; what is saved already stays.

        Args:
          state: one copy of the state, on the host or a device.
          data_state: the data iterator's position at this step.
          wait: return only when it is on disk.

        Raises:
          CheckpointError: this save failed, or the one before.
        """
        arrays = to_host(state)
        step = int(arrays.step)
        if step in self._manager.all_steps():
            self.wait()
            return
        meta = files.sealed(
            {
                "format_version": FORMAT_VERSION,
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
                metrics={SCORE: _UNRANKED},
                force=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when what is being saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def rank(self, step: int, score: float | None) -> None:
        """Notes the score of a saved step, by which the best is chosen and kept.

        The best one before stays until the next save.

        Args:
          step: one that is saved, or being saved.
          score: of its evaluation, process 0's; None ranks below all.

        Raises:
          CheckpointError: that save failed, or the score cannot be written.
        """
        self.wait()
        with self._writing():
            if together.is_first() and score is not None:
                metrics = files.metrics_file(self._directory / str(step))
                write_text(metrics, json.dumps({SCORE: score}))
            together.meet("a checkpoint is ranked")
            self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A failure may be that of the save before, which went on in the background."""
        try:
            yield
        except Exception as error:  # TensorStore's are ValueErrors
            if (lost := files.of_another_process(error)) is not None:
                raise lost  # noqa: B904  it lies below this error already
            raise CheckpointError(
                f"saving to {self._directory} failed: {files.reason(error)}; the "
                "checkpoints there are intact: free space or mend permissions, then "
                "run the same command again"
            ) from error

    def restore_latest(self, like: TrainState) -> Restored | None:
        """The newest intact checkpoint, or None where there never was any.

        Damaged ones on the way are set aside.

        Raises:
          CheckpointError: a checkpoint of another format version, one whose arrays
            do not fit `like`, or no intact one among several.
        """
        while (step := self._newest()) >= 0:
            restored, why = None, "another process could not read it"
            try:
                restored = self._restore(step, like)
            except CheckpointError:
                raise
            except Exception as error:  # any damage must not end the run
                why = files.first_line(error)
            if together.all_agree(restored is not None):
                return restored
            self._manager.close()
            if together.is_first():
                files.set_aside(self._directory / str(step), why)
            together.meet("a damaged checkpoint is set aside")
            self._manager = self._open()
        if any(self._directory.glob("damaged-*")):
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read; those set aside as "
                "damaged-* are still there: restore one from a copy, or start again "
                "with a new --workdir"
            )
        return None

    def _newest(self) -> int:
        """Process 0's, for files may reach others later; -1 where there is none."""
        return together.from_first(max(self._manager.all_steps(), default=-1))

    def restore(self, which: str, like: TrainState) -> Restored:
        """A chosen checkpoint: "last", "best" or a step.

        Raises:
          CheckpointError: there is none, or it is damaged; lists what there is.
        """
        steps = sorted(self._manager.all_steps())
        if which == "last":
            step = self._manager.latest_step()
        elif which == "best":
            step = self._manager.best_step()
        else:
            step = int(which) if which.isdigit() else None
        step = together.from_first(step if step in steps else -1)
        if step < 0:
            damaged = sorted(path.name for path in self._directory.glob("damaged-*"))
            aside = f"; set aside as damaged: {damaged}" if damaged else ""
            raise CheckpointError(
                f"{self._directory} holds no checkpoint {which!r}; steps there: "
                f"{steps or 'none'}{aside}; choose last, best or a step that is there"
            )
        try:
            return self._restore(step, like)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} is damaged: "
                f"{files.first_line(error)}; use --checkpoint=STEP with another of "
                f"{[other for other in steps if other != step] or 'none'}"
            ) from error

    def _restore(self, step: int, like: TrainState) -> Restored:
        folder = self._directory / str(step)
        meta = files.read_meta(folder)
        if (version := meta["format_version"]) != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format version {version}, this program reads "
                f"{FORMAT_VERSION}; continue with the release that wrote it, or start "
                "a new --workdir"
            )
        check_fit(folder, meta["leaves"], describe(like))
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        state = files.read(folder, state=ocp.args.StandardRestore(target))["state"]
        if checksum(state) != meta["checksum"]:
            raise ValueError("its checksum differs: bytes changed on disk")
        return Restored(state, meta["data_state"], step)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes; behind an error, what fails then is only told: it is no cause."""
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            _LOG.error("%s", failed)

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()
