"""Random access to the records of a prepared data set."""

import pathlib
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds


class Records(Sequence[dict]):
    """{"id", "image", "mask", "labeled"} by place; the first three bytes.

    Nothing is decoded: a record costs a read, whatever it holds.

    Args:
      directory: of the prepared data set.
      split: its name.
      ids: of its records, for messages.

    Raises:
      ValueError: a file is missing or damaged, the moment it is met; names the record.
    """

    def __init__(self, directory: pathlib.Path, split: str, ids: Sequence[str]):
        self._directory = directory
        self._split = split
        self._ids = ids
        skip = tfds.decode.SkipDecoding()
        # A decorator of TFDS hides the signature from type checkers.
        as_data_source: Any = tfds.builder_from_directory(directory).as_data_source
        try:
            self._source = as_data_source(
                split=split, decoders={"image": skip, "mask": skip}
            )
        # Damage fails in C++, in TFDS or in the file system, each in its own way.
        except Exception as error:
            raise self._damaged(f"the records of {split}", error) from error
        if len(self._source) != len(ids):
            error = ValueError(f"{len(self._source)} records for {len(ids)} ids")
            raise self._damaged(f"the records of {split}", error)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: Any) -> Any:
        if not -len(self) <= place < len(self):
            raise IndexError(f"record {place} of {len(self)}")
        try:
            return self._source[place]
        except Exception as error:
            name = f"record {self._ids[place]!r} of {self._split}"
            raise self._damaged(name, error) from error

    def _damaged(self, what: str, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(
            f"{what} cannot be read from {self._directory} ({reason}): remove that "
            "folder and prepare the data set again"
        )
