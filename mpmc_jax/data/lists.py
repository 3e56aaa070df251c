"""Id lists, in the two formats in which splits are published.

    JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png     image and mask
    2007_000032                                                     bare id

Blank lines, a missing final newline and Windows line ends are all legal.
"""

import pathlib
from collections.abc import Collection, Hashable
from typing import TypeVar

# Endings of what `images` reads.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".npy")

T = TypeVar("T", bound=Hashable)


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a list that are not blank, stripped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such id list") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def strip_suffix(name: str) -> str:
    """Removes the ending of an image file or slice; other dots belong to the id."""
    path = pathlib.PurePosixPath(name)
    if path.suffix.lower() in (*IMAGE_SUFFIXES, ".h5"):
        return str(path.with_suffix(""))
    return str(path)


def resolve(line: str, known: Collection[str]) -> str | None:
    """The id in `known` that a line of either format means, or None.

    A path matches by its whole, then without its leading folders one by one, so that
    lists relative to another root fit. A line that is an id is that id, blanks and all.
    """
    for text in (line, line.split()[0]):
        parts = pathlib.PurePosixPath(strip_suffix(text)).parts
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate in known:
                return candidate
    return None


def repeated(items: list[T]) -> list[T]:
    """Those that occur more than once, each once, in order."""
    seen: set[T] = set()
    again: dict[T, None] = {}
    for item in items:
        if item in seen:
            again[item] = None
        seen.add(item)
    return list(again)


def shorten(items: list, limit: int = 5) -> str:
    """A list for an error message: the first few, then how many more."""
    text = ", ".join(map(str, items[:limit]))
    rest = len(items) - limit
    return text if rest <= 0 else f"{text} and {rest} more"
