"""Reads id lists in the two formats in which splits are published.

    JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png     image and mask
    2007_000032                                                     id alone

Blank lines, a missing final newline, a byte order mark and the line ends of any system
are allowed. Names are compared in Unicode's composed form (NFC), because file systems
and archives store accents in either form.
"""

import codecs
import pathlib
import re
import unicodedata
from collections.abc import Collection, Hashable
from typing import TypeVar

from mpmc_jax.text import shorten

# Endings of the files that `decode` reads.
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_SUFFIXES = (*_JPEG_SUFFIXES, ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy")

_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

T = TypeVar("T", bound=Hashable)


def read_lines(path: pathlib.Path) -> list[str]:
    """Reads the lines of a list that are not blank, stripped and `composed`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    return [composed(line) for line in _read_stripped(path)]


def read_paths(path: pathlib.Path) -> list[str]:
    """Reads a list of files, one path per line, relative to the list's folder.

    Accents are returned in the form in which the file's name is stored.

    Raises:
      FileNotFoundError, ValueError: see `read_lines`.
    """
    lines = _read_stripped(path)
    return [_as_stored(path.parent, line) for line in lines]


def _as_stored(folder: pathlib.Path, line: str) -> str:
    """Returns a path in the Unicode form in which it exists; as it is, if in none."""
    decomposed = unicodedata.normalize("NFD", line)
    forms = (line, composed(line), decomposed)
    return next((form for form in forms if (folder / form).exists()), line)


def _read_stripped(path: pathlib.Path) -> list[str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such id list") from None
    encoding = "utf-16" if content.startswith(_BYTE_ORDER_MARKS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a text file in UTF-8 ({error}); save it as UTF-8"
        ) from error
    lines = (line.strip() for line in re.split("\r\n|\r|\n", text))
    return [line for line in lines if line]


def composed(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC), which all ids have."""
    return unicodedata.normalize("NFC", name)


def strip_suffix(name: str) -> str:
    """Removes the ending of an image file or slice; other dots are part of the id."""
    path = pathlib.PurePosixPath(name)
    if path.suffix.lower() in (*IMAGE_SUFFIXES, ".h5"):
        return str(path.with_suffix(""))
    return str(path)


def resolve(line: str, known: Collection[str]) -> str | None:
    """Returns the id in `known` that a composed line stands for, or None.

    The whole line is tried first, as ids may hold blanks, then its first word. A path
    is tried whole, then without its leading folders one by one, so that lists relative
    to another root work.
    """
    for text in (line, line.split()[0]):
        parts = pathlib.PurePosixPath(strip_suffix(text)).parts
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate in known:
                return candidate
    return None


def repeated(items: list[T]) -> list[T]:
    """Returns the items that occur more than once, each once, in order."""
    seen: set[T] = set()
    again: dict[T, None] = {}
    for item in items:
        if item in seen:
            again[item] = None
        seen.add(item)
    return list(again)


def unique(items: list[T], path: pathlib.Path, problems: list[str]) -> list[T]:
    """Returns the items of a list without repeats; adds a problem if there are any."""
    again = repeated(items)
    if again:
        problems.append(f"{path}: repeats {shorten(again)}")
    return list(dict.fromkeys(items))
