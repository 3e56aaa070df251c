"""Writes the metrics of a run to the terminal, metrics.jsonl and TensorBoard.

`Writer` is the interface of TensorBoard's and further writers.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tqdm
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

from mpmc_jax import distributed
from mpmc_jax.atomic_write import to_json, write_bytes
from mpmc_jax.text import bar_width, printable, quantity
from mpmc_jax.training.class_watch import ClassWatch

_LOG = logging.getLogger(__name__)

# Seconds between two flushes while numbers are written.
_FLUSH_EVERY = 60


class _BarHandler(logging.StreamHandler):
    """Writes lines above the progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """Escapes control characters, which names of files may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def setup_logging() -> None:
    """Lets this package's messages through to the terminal, and only these.

    Those of libraries (Orbax, grain) stay at warnings: they would drown a run's.
    """
    logger = logging.getLogger("mpmc_jax")
    if not logger.handlers:
        handler = _BarHandler()
        handler.setFormatter(_Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a PNG file, with its size in pixels."""

    png: bytes
    height: int
    width: int


class Writer(Protocol):
    """Gets what a run measures, besides metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step; raises OSError if that fails."""

    def write_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Adds pictures by name; raises OSError if that fails."""

    def flush(self) -> None:
        """Flushes what was added to disk; raises OSError if that fails."""

    def close(self) -> None:
        """Ends writing; raises no error."""


class MetricWriter:
    """Writes the metrics of a run; only process 0 writes.

    `metrics.jsonl` gets one object per line with `step` and flat names. On resume the
    lines after the restored step, and those that cannot be read, are moved to
    `metrics.jsonl.cut`, so that no step appears twice and nothing is lost.

    Args:
      workdir: the run's directory.
      start: steps made already.
      steps: length of the run.
      images: labeled and unlabeled images per step.
      classes: names of the classes, for their shares.
      rampup: see `ClassWatch`.
      further: makes further writers, in process 0 alone.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        steps: int,
        images: int,
        classes: Sequence[str] = (),
        rampup: int = 0,
        further: Callable[[], Sequence[Writer]] = tuple,
    ) -> None:
        self._active = distributed.is_first()
        self._steps = steps
        self._images = images
        self._classes = tuple(classes)
        self._watch = ClassWatch(self._classes, start, steps, rampup)
        # name -> sum and number of steps since the last line
        self._means: dict[str, tuple[float, int]] = {}
        self.restart_clock()
        self._path = workdir / "metrics.jsonl"
        if not self._active:
            return
        _drop_after(self._path, start)
        self._file = self._path.open("a")
        self._writers = [_EventFile(workdir / "tensorboard", start), *further()]
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            disable=not sys.stderr.isatty(),
            bar_format="{bar}| {n_fmt}/{total_fmt}{postfix}",
            **bar_width(sys.stderr),
        )

    def written(self, step: int, name: str) -> list[float | None]:
        """Returns what metrics.jsonl has of that name at that step, in process 0."""
        return [line[name] for line in self._lines(name) if line["step"] == step]

    def history(self, name: str) -> list[float | None]:
        """Returns what metrics.jsonl has of that name at any step, in process 0."""
        return [line[name] for line in self._lines(name)]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Reads the lines of metrics.jsonl that have a name; none but in process 0."""
        if not self._active:
            return []
        lines = map(json.loads, self._path.read_text().splitlines())
        return [line for line in lines if name in line]

    def add(
        self, values: Mapping[str, Any], shares: Mapping[str, Any] | None = None
    ) -> None:
        """Adds one step's metrics to the means of the next line.

        NaN marks a mean over nothing; such a step does not count for that name.

        Args:
          values: name -> scalar.
          shares: kind -> (c,) share of each class, see `train_step.Metrics`.
        """
        named = {}
        if self._classes and shares:
            for kind, of_classes in shares.items():
                names = (f"share/{kind}/{each}" for each in self._classes)
                named.update(zip(names, of_classes, strict=True))
            if self._active:
                self._watch.add(shares, float(values.get("confident", 0.0)))
        for name, value in {**values, **named}.items():
            if not math.isnan(value):
                summed, steps = self._means.get(name, (0.0, 0))
                self._means[name] = (summed + float(value), steps + 1)
        self._timed += 1
        if self._active:
            self._bar.update()

    def flush(self, step: int) -> None:
        """Writes the means since the last line, with images/s and the time left.

        A name that had no number in any step is left out.
        """
        if not self._means:
            return
        seconds = time.monotonic() - self._since
        values = {f"train/{k}": v / steps for k, (v, steps) in self._means.items()}
        left = ""
        if self._timed > 0:
            per_step = seconds / self._timed
            values["train/images_per_second"] = self._images / per_step
            left = f"{duration(per_step * (self._steps - step))} left"
        self.write(step, values)
        if self._active and self._bar.disable:
            _LOG.info("%s", self._log_line(step, values, left))
        elif self._active:
            self._bar.set_postfix_str(_bar_text(values, left))
        self._means = {}
        self.restart_clock()

    def _log_line(self, step: int, values: Mapping[str, float], left: str) -> str:
        """Formats all losses, the learning rate, images/s and the time left."""
        parts = [f"step {step}/{self._steps}"]
        parts += [
            f"{name.removeprefix('train/').removeprefix('loss_')} {value:.4f}"
            for name, value in values.items()
            if name.startswith("train/loss")
        ]
        parts.append(f"lr {values['train/lr']:.2e}")
        if left:
            parts += [f"{values['train/images_per_second']:.2f} images/s", left]
        return "  ".join(parts)

    def restart_clock(self, untimed: int = 0) -> None:
        """Starts timing again, to leave out compilation and evaluation.

        Args:
          untimed: steps that were made before but will be added afterwards.
        """
        self._since = time.monotonic()
        self._timed = -untimed

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl, and the same to all writers.

        Raises:
          OSError: the line could not be written; the message names the file.
        """
        if not self._active:
            return
        with self._writing(step):
            self._file.write(to_json({"step": step, **values}) + "\n")
            self._file.flush()
            for writer in self._writers:
                writer.write(step, values)

    def write_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Writes pictures by name, where there is a place for them.

        Raises:
          OSError: see `write`.
        """
        if self._active:
            with self._writing(step):
                for writer in self._writers:
                    writer.write_pictures(step, pictures)

    def sync(self, step: int) -> None:
        """Flushes all lines to disk, so that a checkpoint's steps have all of theirs.

        Raises:
          OSError: see `write`.
        """
        if not self._active:
            return
        with self._writing(step):
            os.fsync(self._file.fileno())
            for writer in self._writers:
                writer.flush()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._path} or tensorboard/ next to it: step {step} could not be "
                f"written: {error.strerror}; what the newest checkpoint holds is kept: "
                "free space, then run the same command again"
            ) from error

    def close(self) -> None:
        """Closes the files and the bar."""
        if self._active:
            self._bar.close()
            for writer in self._writers:
                writer.close()
            # It writes what is left; a full disk was already reported.
            with contextlib.suppress(OSError):
                self._file.close()


def _bar_text(values: Mapping[str, float], left: str) -> str:
    """Formats the total loss, images/s and the time left, to fit next to the bar."""
    parts = [f"loss {values['train/loss']:.3f}"]
    if left:
        parts += [f"{values['train/images_per_second']:.1f} images/s", left]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Formats seconds as 1h02m or 3m07s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _drop_after(path: Path, step: int) -> None:
    """Keeps the readable lines up to a step; moves the others to a file next to it."""
    if not path.exists():
        return
    kept, cut, damaged = [], [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        at = _step_of(line)
        if at is not None and at <= step:
            kept.append(line)
        else:
            cut.append(line if line.endswith(b"\n") else line + b"\n")
            damaged += at is None
    if not cut:
        return
    moved_to = path.with_name(f"{path.name}.cut")
    with moved_to.open("ab") as file:
        file.writelines(cut)
        file.flush()
        os.fsync(file.fileno())
    write_bytes(path, b"".join(kept))
    _LOG.info(
        "%s: moved %s to %s: %d of steps after step %d, from which the run resumes, "
        "and %d that cannot be read",
        path,
        quantity(len(cut), "line"),
        moved_to.name,
        len(cut) - damaged,
        step,
        damaged,
    )


def _step_of(line: bytes) -> int | None:
    """Reads the step of a line of metrics.jsonl; None if it cannot be read."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the lines of a metrics.jsonl, except one that a run is writing.

    Raises:
      ValueError: a line cannot be read; the message names it and the fix.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            if line.endswith(b"\n"):
                found = json.loads(line)
                lines.append({**found, "step": int(found["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: line {number} cannot be read; `launch.train` on that run "
                f"moves it to {path.name}.cut"
            ) from error
    return lines


class _EventFile:
    """A file of TensorBoard events.

    A failed write raises at once. tensorboardX's SummaryWriter writes from a thread
    that a full disk ends, and then waits forever to hand it the next number.

    Args:
      directory: folder of the run's event files; every start of the run adds one.
      start: steps made already; TensorBoard discards earlier events of later steps.
    """

    def __init__(self, directory: Path, start: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._writer = RecordWriter(str(directory / name))
        self._flushed = time.monotonic()
        self._put(file_version="brain.Event:2")
        self._put(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step.

        Raises:
          OSError: these numbers or earlier ones could not be written.
        """
        for name, value in values.items():
            # Not tensorboardX's `scalar`: it replaces blanks and brackets by "_", which
            # may give two classes the same tag.
            one = Summary.Value(tag=name, simple_value=value)
            self._put(step=step, summary=Summary(value=[one]))
        self._flush_sometimes()

    def write_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Adds pictures; see `write`."""
        for name, picture in pictures.items():
            image = Summary.Image(
                height=picture.height,
                width=picture.width,
                colorspace=3,
                encoded_image_string=picture.png,
            )
            one = Summary.Value(tag=name, image=image)
            self._put(step=step, summary=Summary(value=[one]))
        self._flush_sometimes()

    def _flush_sometimes(self) -> None:
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Flushes the file to disk.

        Raises:
          OSError: it could not be written.
        """
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file; a write that fails now was already reported."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _put(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
