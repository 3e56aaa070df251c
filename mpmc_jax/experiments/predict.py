"""Segments image files, folders and volumes with a trained run, and writes the results.

Images of one size share batches and compiled programs; threads read the next images and
write the last results meanwhile.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from mpmc_jax.data import decode, stacks
from mpmc_jax.data.decode import decode_array
from mpmc_jax.data.parallel_map import map_in_order
from mpmc_jax.evaluation import pictures, prediction_files
from mpmc_jax.evaluation.batches import mirrored
from mpmc_jax.evaluation.predict import WINDOW_ABOVE, Band, Predictor
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.patch_maps import patch_classifier
from mpmc_jax.experiments.run import Run
from mpmc_jax.text import first_line, quantity

# Errors of the disk, which every further image would cause again.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

T = TypeVar("T")
# Fewer images of a size are not worth compiling programs for it.
_FEW = 8
# What a file is that is not predicted as an image: results exist, or it has several.
_DONE, _STACK = "done", "stack"


class DiskError(OSError):
    """No further image could be written, as on a full disk."""


@dataclasses.dataclass(frozen=True)
class _Image:
    """An image to predict.

    Attributes:
      file: its file.
      size: rows and columns.
      targets: the files to write, by kind.
      read: reads (h,w,c) as stored.
      tags: its georeference.
    """

    file: pathlib.Path
    size: tuple[int, int]
    targets: Mapping[str, pathlib.Path]
    read: Callable[[], np.ndarray]
    tags: stacks.Tags = ()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Images on arrays of one size; rows beyond the number of images are filler."""

    size: tuple[int, int]
    rows: int
    images: Sequence[_Image]


class PredictionWriter:
    """Segments image files and writes the results.

    Attributes:
      written: how many files were segmented.
      kept: how many had their results already.
    """

    def __init__(
        self,
        run: Run,
        output: pathlib.Path,
        *,
        overwrite: bool,
        kinds: Sequence[str] = prediction_files.PICTURES,
        window_above: int = WINDOW_ABOVE,
    ):
        """Prepares the prediction.

        Args:
          run: a run.
          output: folder of the results.
          overwrite: whether to replace results of this program.
          kinds: what to write, of `prediction_files.KINDS`.
          window_above: see `Predictor`.

        Raises:
          ValueError: an unknown kind, or one that the run does not have.
        """
        prediction_files.check_kinds(kinds, patches=run.probe is not None)
        self._facts, self._pad_to = run.facts, run.config.eval.pad_to
        self._batch_size = run.config.eval.batch_size
        self._output, self._overwrite, self._kinds = output, overwrite, tuple(kinds)
        self._probabilities = prediction_files.need_probabilities(kinds)
        self._predictor = Predictor(
            run.module,
            run.variables,
            run.facts.pixels,
            make_protocol(run.config),
            devices=jax.local_devices(),
            window_above=window_above,
        )
        self._patches = patch_classifier(run) if "patches" in kinds else None
        self.written = self.kept = 0
        self._warned = False
        self._failed: dict[pathlib.Path, str] = {}

    def problems(self, files: Iterable[pathlib.Path]) -> list[str]:
        """Returns a line for each file that could not be segmented, in order."""
        return [self._failed[file] for file in files if file in self._failed]

    def predict(
        self, outputs: Mapping[pathlib.Path, pathlib.PurePath]
    ) -> Iterator[pathlib.Path]:
        """Segments files; yields each when it is done, has failed or was kept.

        Args:
          outputs: file -> path of its results below the output folder, without an
            ending.

        Raises:
          DiskError: no further image could be written.
        """
        images: list[_Image] = []
        volumes: list[pathlib.Path] = []

        def examine(file: pathlib.Path) -> _Image | str:
            return self._examine(file, self._output / outputs[file])

        examined = map_in_order(functools.partial(_attempt, examine), outputs)
        for file, (found, error) in zip(outputs, examined, strict=True):
            if error is not None:
                self._fail(file, error)
            elif isinstance(found, _Image):
                images.append(found)
                continue
            elif found == _STACK:
                self._warn_of_scaling(file)
                volumes.append(file)
                continue
            else:
                self.kept += 1
            yield file
        for image, _ in self._predict_images(images):
            self.written += image.file not in self._failed
            yield image.file
        for file in volumes:
            _, error = _attempt(self._predict_stack, file, self._output / outputs[file])
            if error is not None:
                self._fail(file, error)
            yield file

    def _examine(self, file: pathlib.Path, stem: pathlib.Path) -> _Image | str:
        """Returns an image to predict, `_STACK`, or `_DONE` if its results exist."""
        if not file.is_file():
            raise ValueError(
                "a pipe or device, no file" if file.exists() else "no file"
            )
        pixels = self._facts.pixels
        is_stack, tags = stacks.inspect_tiff(file, pixels)
        if is_stack or stacks.is_nifti(file):
            return _STACK
        targets = prediction_files.paths(stem, self._kinds, georeferenced=bool(tags))
        if self._are_done(targets.values()):
            return _DONE
        size = decode.read_header(file.read_bytes()).size

        def read() -> np.ndarray:
            return decode_array(file.read_bytes(), pixels)

        return _Image(file, size, targets, read, tags)

    def _warn_of_scaling(self, file: pathlib.Path) -> None:
        """Warns, once, of volumes that may differ from the images of training."""
        scaled = stacks.is_nifti(file) and self._facts.dataset != "acdc"
        if scaled and not self._warned:
            self._warned = True
            logging.warning(
                "%s: volumes are scaled from their smallest to their largest value, "
                "and slices are stored as (Y,X), as ACDC is prepared. If the images of "
                "training were exported from volumes in another way, export these in "
                "the same way and predict the images.",
                file,
            )

    def _are_done(self, targets: Iterable[pathlib.Path]) -> bool:
        """Whether results exist already and stay.

        Raises:
          ValueError: there is a file that this program did not write.
        """
        targets = list(targets)
        existing = [each for each in targets if each.exists() or each.is_symlink()]
        foreign = [x for x in existing if not prediction_files.is_prediction(x)]
        if foreign:
            raise ValueError(
                f"its result would replace {foreign[0]}, which this program did not "
                "write; choose another --output"
            )
        # A call that was killed may have written only some of them.
        return existing == targets and not self._overwrite

    def _predict_stack(self, file: pathlib.Path, stem: pathlib.Path) -> None:
        """Segments a stack: a folder with the results of each slice.

        The classes of a NIfTI volume are a single file, on the same grid.
        """
        with contextlib.closing(stacks.open_stack(file, self._facts.pixels)) as stack:
            kinds, volume = self._kinds, None
            if stack.nifti is not None and "index" in kinds:
                kinds = tuple(kind for kind in kinds if kind != "index")
                volume = stem.with_name(f"{stem.name}_index.nii.gz")
            images = [
                _Image(
                    file,
                    stack.size,
                    prediction_files.paths(stem / f"{i + 1:04d}", kinds),
                    functools.partial(stack.read, i),
                )
                for i in range(stack.depth)
            ]
            targets = [path for image in images for path in image.targets.values()]
            if self._are_done([*targets, volume] if volume else targets):
                self.kept += 1
                return
            position = {id(image): i for i, image in enumerate(images)}
            classes = np.zeros((stack.depth, *stack.size), np.uint8)
            for image, found in self._predict_images(images):
                if found is not None:
                    classes[position[id(image)]] = found
            if file not in self._failed:
                if volume is not None and stack.nifti is not None:
                    prediction_files.write_volume(volume, classes, stack.nifti)
                self.written += 1

    def _predict_images(
        self, images: Sequence[_Image]
    ) -> Iterator[tuple[_Image, np.ndarray | None]]:
        """Segments images and yields each with its classes; None where it failed."""
        windowed, whole = self._divide(images)
        batches = self._batches(whole)
        writing: collections.deque[tuple[_Image, concurrent.futures.Future]]
        writing = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            in_order = (image for batch in batches for image in batch.images)
            loaded = map_in_order(functools.partial(_attempt, _load), in_order)
            for batch in batches:
                stored, errors = self._stack(batch, loaded)
                found, failure = _attempt(self._predict_batch, batch, stored)
                for row, (image, error) in enumerate(
                    zip(batch.images, errors, strict=True)
                ):
                    if found is None or error is not None:
                        cause = error or failure
                        assert cause is not None  # One of them is why.
                        self._fail(image.file, cause)
                        yield image, None
                        continue
                    written = pool.submit(self._write, image, *found(row))
                    writing.append((image, written))
                while _pixels(image for image, _ in writing) > WINDOW_ABOVE:
                    yield self._finish(*writing.popleft())
            while writing:
                yield self._finish(*writing.popleft())
        for image in windowed:
            classes, error = _attempt(self._predict_in_windows, image)
            if error is not None:
                self._fail(image.file, error)
            yield image, classes

    def _divide(self, images: Sequence[_Image]) -> tuple[list[_Image], list[_Image]]:
        """Divides images into those predicted in windows and those in batches.

        In windows are large images, and those of rare sizes where it changes nothing:
        windows share a program, whatever the image's size.
        """
        predictor, parts = self._predictor, ([], [])
        counts = collections.Counter(image.size for image in images)
        exact = predictor.windows_are_exact and self._patches is None
        for image in images:
            rare = exact and counts[image.size] < _FEW
            parts[not (rare or predictor.uses_windows(image.size))].append(image)
        return parts

    def _batches(self, images: Sequence[_Image]) -> list[_Batch]:
        """Groups images by the size of their arrays, and cuts groups into batches."""
        groups = collections.defaultdict(list)
        for image in images:
            size = self._predictor.protocol.canvas(image.size, self._pad_to)
            groups[size].append(image)
        batches = []
        for size, members in sorted(groups.items()):
            most = self._predictor.rows_per_batch(size, self._batch_size)
            # As few rows as possible, the same for all: they share a program.
            rows = math.ceil(len(members) / math.ceil(len(members) / most))
            for start in range(0, len(members), rows):
                batches.append(_Batch(size, rows, members[start : start + rows]))
        return batches

    def _stack(
        self,
        batch: _Batch,
        loaded: Iterator[tuple[np.ndarray | None, Exception | None]],
    ) -> tuple[np.ndarray, list[Exception | None]]:
        """Stacks a batch's images; one that could not be read is black, with its error.

        Args:
          batch: the batch.
          loaded: images and errors, of which it takes those of this batch.
        """
        pixels = self._facts.pixels
        shape = (batch.rows, *batch.size, pixels.channels)
        stored, errors = np.zeros(shape, pixels.dtype), []
        for row in range(len(batch.images)):
            found, error = next(loaded)
            if found is not None:
                stored[row] = mirrored(found, batch.size)
            errors.append(error)
        return stored, errors

    def _predict_batch(
        self, batch: _Batch, stored: np.ndarray
    ) -> Callable[[int], tuple[list[Band], np.ndarray, Any]]:
        """Returns the function from a row to its prediction, image and patches."""
        classes, probabilities = self._predictor.batch(
            stored, probabilities=self._probabilities
        )
        patches = self._patches and self._patches.classify(stored)

        def of_row(row: int) -> tuple[list[Band], np.ndarray, Any]:
            rows, columns = batch.images[row].size
            scores = probabilities
            if scores is not None:
                scores = scores[row, :rows, :columns]
            band = Band(0, classes[row, :rows, :columns], scores)
            image = stored[row, :rows, :columns]
            return [band], image, patches and patches.arrays(row, (rows, columns))

        return of_row

    def _predict_in_windows(self, image: _Image) -> np.ndarray:
        if self._patches is not None:
            raise ValueError(
                "it is predicted in windows, and the patch classifier takes whole "
                "images; leave patches out of --outputs, or raise --window_above"
            )
        stored = image.read()
        bands = self._predictor.bands(
            stored, probabilities=self._probabilities, windows=True
        )
        return self._write(image, bands, stored, None)

    def _write(
        self,
        image: _Image,
        bands: Iterable[Band],
        stored: np.ndarray,
        patches: Mapping[str, np.ndarray] | None,
    ) -> np.ndarray:
        """Writes the results of one image, and returns its classes."""
        facts = self._facts
        for path in image.targets.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        return prediction_files.write_prediction(
            image.targets,
            bands,
            pictures.displayable(stored, facts.pixels),
            facts.palette,
            tags=image.tags,
            patches=patches,
        )

    def _finish(
        self, image: _Image, future: concurrent.futures.Future
    ) -> tuple[_Image, np.ndarray | None]:
        """Waits until an image is written."""
        classes, error = _attempt(future.result)
        if error is not None:
            self._fail(image.file, error)
        return image, classes

    def _fail(self, file: pathlib.Path, error: Exception) -> None:
        """Records that a file could not be segmented.

        Raises:
          DiskError: no further image could be written.
        """
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise DiskError(
                f"{error.filename or file}: {error.strerror}; "
                f"{quantity(self.written, 'image')} written; run the same command "
                "again for the others"
            ) from error
        self._failed.setdefault(file, f"{file}: {first_line(error, limit=None)}")


def _load(image: _Image) -> np.ndarray:
    """Reads an image.

    Raises:
      ValueError: it has another size than before.
    """
    stored = image.read()
    if stored.shape[:2] != image.size:
        raise ValueError("the file changed while it was read")
    return stored


def _attempt(
    function: Callable[..., T], *args: Any
) -> tuple[T | None, Exception | None]:
    """Returns a function's value or the error that it raised, but for `DiskError`."""
    try:
        return function(*args), None
    except DiskError:
        raise
    # Decoders raise errors of their own, a network fails on sizes that it cannot take,
    # and memory on images that are too large; the next image may succeed.
    except Exception as error:
        return None, error


def _pixels(images: Iterable[_Image]) -> int:
    return sum(math.prod(image.size) for image in images)
