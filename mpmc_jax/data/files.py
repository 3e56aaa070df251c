"""Finds the data files of a folder.

Hidden files, and files that operating systems leave behind, are skipped. Symbolic links
are followed, but each folder is entered only once; a second path to it is a problem.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable

from mpmc_jax.data.lists import composed
from mpmc_jax.text import shorten

# Left behind by Windows, Synology and macOS's archives; others begin with a dot.
_SYSTEM = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The files at any depth below a folder, sorted.

    Attributes:
      read: files with a wanted ending.
      unread: all other files.
      hidden: hidden files and hidden folders, which are not entered.
    """

    read: tuple[pathlib.Path, ...] = ()
    unread: tuple[pathlib.Path, ...] = ()
    hidden: tuple[pathlib.Path, ...] = ()

    def note(self, directory: pathlib.Path) -> list[str]:
        """Returns a line that counts unread files by ending; [] if all are read."""
        kinds = collections.defaultdict(list)
        for path in self.unread:
            kinds[path.suffix.lower() or "without ending"].append(path.name)
        if self.hidden:
            kinds["hidden"] = [path.name for path in self.hidden]
        if not kinds:
            return []
        counted = (
            f"{len(names)} {shorten([kind])} ({shorten(names, 3)})"
            for kind, names in kinds.items()
        )
        return [f"{directory}: not read: {'; '.join(counted)}"]


def is_hidden(path: pathlib.Path) -> bool:
    """Returns whether a file or folder is skipped by its name, such as .DS_Store."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM


def visible(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the paths that are not hidden, sorted."""
    return sorted(path for path in paths if not is_hidden(path))


def by_stem(directory: pathlib.Path, ending: str) -> dict[str, pathlib.Path]:
    """Returns the files of one ending directly in a folder, by `composed` stem."""
    return {composed(path.stem): path for path in visible(directory.glob(f"*{ending}"))}


def find(
    directory: pathlib.Path, endings: tuple[str, ...], problems: list[str]
) -> FoundFiles:
    """Finds the files below a folder.

    Args:
      directory: an existing folder.
      endings: endings of the files to read, in lower case.
      problems: gets a line for each bad link and for names that are not UTF-8.
    """
    root = pathlib.Path(os.path.realpath(directory))
    entered: dict[str, pathlib.Path] = {}
    read, unread, hidden, strange = [], [], [], []
    folders = [directory]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in entered:
            problems.append(
                f"{folder}: a link makes it the same folder as {entered[real]}; remove "
                "the link"
            )
            continue
        if folder != directory and root.is_relative_to(real):
            problems.append(
                f"{folder}: a link to {real}, which holds {directory}; remove the link"
            )
            continue
        entered[real] = folder
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}; mend its permissions")
            continue
        for path in inside:
            if is_hidden(path):
                hidden.append(path)
            elif not _is_utf8(path.name):
                strange.append(str(path))
            elif path.is_dir():
                folders.append(path)
            elif not path.name.lower().endswith(endings):
                unread.append(path)
            elif path.is_file():
                read.append(path)
            else:
                problems.append(f"{path}: not a file; {_why_not(path)}")
    if strange:
        problems.append(
            f"{directory}: {len(strange)} names are not UTF-8: {shorten(strange)}; "
            "rename them, or unpack the archive with its own encoding"
        )
    return FoundFiles(tuple(sorted(read)), tuple(sorted(unread)), tuple(sorted(hidden)))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why_not(path: pathlib.Path) -> str:
    if path.is_symlink():
        return f"a symbolic link to {os.readlink(path)}, which does not exist"
    return "a pipe or device; remove it"
