"""Writes prepared data sets by TFDS, as ArrayRecord files, without TensorFlow.

A record holds `image` and `mask` as encoded bytes (see `decode`), `id` and `labeled`.
Unlabeled images have a void mask of one pixel, because a TFDS feature cannot be absent.
Records are in the order of the source, so that positions and ids are interchangeable.
The file metadata.json beside them holds everything else that training needs, and the
SHA-256 of each split's records.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from mpmc_jax.data import decode, masks, parallel_map
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.source import Blob, Sample, Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

# Version of the prepared data, and name of their folder. A release reads only this one.
VERSION = "1.4.0"
_NO_MASK = decode.encode_png(np.full((1, 1), IGNORE_LABEL, np.uint8))
# TFDS sorts records by 128-bit keys, in buckets by the leading bits. Keys use all bits,
# as consecutive integers would all be in one bucket, which is held in memory.
_KEY_BITS = 128


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS builder that writes a checked `Source`.

    Args:
      source: the data set to write, without problems.
      present: id of each labeled sample -> indices of the classes in its mask.
      data_dir: folder of all prepared data sets.
      digests: see `Source.fingerprint`.
      warnings: see `DatasetInfo`.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        source: Source,
        present: dict[str, tuple[int, ...]],
        data_dir: str,
        digests: Mapping[str, bytes] | None = None,
        warnings: Sequence[str] = (),
    ):
        # TFDS names a builder by its class; all data sets share this one.
        self.name = source.name  # pyright: ignore
        self._source = source
        self._present = present
        self._digests = digests
        self._warnings = list(warnings)
        self._contents: dict[str, str] = {}
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        source = self._source
        metadata = tfds.core.MetadataDict(
            class_names=source.class_names,
            palette=source.palette,
            pixels=dataclasses.asdict(source.pixels),
            image_format=decode.image_format(source.pixels),
            ignore_label=IGNORE_LABEL,
            fingerprint=source.fingerprint(self._digests),
            partial=source.partial,
            contents=self._contents,  # Filled while records are written.
            ids={
                split: [sample.id for sample in samples]
                for split, samples in source.splits.items()
            },
            present=self._present,
            warnings=self._warnings,
            volumes={
                sample.id: sample.volume
                for samples in source.splits.values()
                for sample in samples
                if sample.volume
            },
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": _image_feature(source.pixels),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "labeled": np.bool_,
                }
            ),
            metadata=metadata,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # Nothing is ever downloaded.
        return {
            split: self._generate_examples(split, samples)
            for split, samples in self._source.splits.items()
        }

    def _generate_examples(
        self, split: str, samples: tuple[Sample, ...]
    ) -> Iterator[tuple[int, dict]]:
        digest = hashlib.sha256()
        title = f"writing {split}"
        records = parallel_map.map_with_progress(self._encode, samples, title)
        for position, record in enumerate(records):
            add_record(digest, record["id"], record["image"], record["mask"])
            files = {"mask": io.BytesIO(record["mask"])}
            if decode.is_picture(self._source.pixels):
                files["image"] = io.BytesIO(record["image"])
            key = (position << _KEY_BITS) // len(samples)
            yield key, {**record, **files}
        self._contents[split] = digest.hexdigest()

    def _encode(self, sample: Sample) -> dict:
        image, pixels = source_lib.read_bytes(sample.image), self._source.pixels
        mask = _NO_MASK
        if sample.mask is not None:
            missing = None
            if pixels.nodata:
                missing = pixels.missing(decode.decode_stored(image, pixels))
            mask = _index_mask(sample.mask, self._source, missing)
        image = decode.encode_record(image, pixels, unpacked=self._source.unpacked)
        return {
            "id": sample.id,
            "image": image,
            "mask": mask,
            "labeled": sample.mask is not None,
        }


def _image_feature(pixels: PixelFormat) -> tfds.features.FeatureConnector:
    if decode.is_picture(pixels):
        return tfds.features.Image(shape=(None, None, pixels.channels))
    return tfds.features.Tensor(shape=(), dtype=np.object_)


def add_record(digest: "hashlib._Hash", key: str, image: bytes, mask: bytes) -> None:
    """Adds one record to the digest of its split."""
    for part in (key.encode(), image, mask):
        digest.update(hashlib.sha256(part).digest())


def _index_mask(mask: Blob, source: Source, missing: np.ndarray | None) -> bytes:
    """Returns a PNG of a mask's labels, which is its own file if that is such a PNG."""
    content = source_lib.read_bytes(mask)
    found = masks.read_mask(content, source.masks).without(missing)
    if found.is_plain and not source.unpacked:
        return content
    return decode.encode_png(found.label_hw)


def dataset_directory(data_dir: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the folder of the prepared data set `name`, whether it exists or not."""
    return pathlib.Path(data_dir) / name / VERSION


def is_complete(directory: pathlib.Path) -> bool:
    """Returns whether a folder holds a complete prepared data set."""
    return (directory / "metadata.json").is_file()


def write(builder: SegmentationBuilder) -> pathlib.Path:
    """Prepares a data set and returns its folder, which appears only when complete.

    A run that is killed leaves a folder named `incomplete` beside it, which the next
    run removes.

    Raises:
      FileExistsError: the data set is prepared already, perhaps by a concurrent run.
      BlockingIOError: another run is preparing the data set.
      OSError: files cannot be written.
    """
    directory = pathlib.Path(builder.data_dir)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent):
        if is_complete(directory):
            raise FileExistsError(f"{directory}: is prepared already")
        for incomplete in directory.parent.glob("incomplete.*"):
            shutil.rmtree(incomplete)
        _write_quietly(builder)
    return directory


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """Locks a folder; the system releases the lock if this process is killed."""
    path = directory / "prepare.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{path}: another run is preparing this data set; wait for it"
            ) from None
        yield


def _write_quietly(builder: SegmentationBuilder) -> None:
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        logging.set_verbosity(verbosity)
