"""Which files of a folder are data.

Hidden files and what operating systems leave behind are no data. Symbolic links are
followed, but a folder is entered once only: a second way into it is a problem.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable

from mpmc_jax.data.lists import composed, shorten

# Left by Windows, Synology and macOS's archives; others of their kind begin with a dot.
_SYSTEM = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")


@dataclasses.dataclass(frozen=True)
class Found:
    """The files at any depth below a folder, sorted.

    Attributes:
      read: those with a wanted ending.
      unread: all others.
      hidden: hidden files, and hidden folders, which are not entered.
    """

    read: tuple[pathlib.Path, ...] = ()
    unread: tuple[pathlib.Path, ...] = ()
    hidden: tuple[pathlib.Path, ...] = ()

    def note(self, directory: pathlib.Path) -> list[str]:
        """A line that counts what is not read, by ending; [] if that is nothing."""
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
    """Whether a file or folder is no data by its name, such as .DS_Store."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM


def visible(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Those that are not hidden, sorted."""
    return sorted(path for path in paths if not is_hidden(path))


def by_stem(directory: pathlib.Path, ending: str) -> dict[str, pathlib.Path]:
    """Stem in composed Unicode -> file directly in a folder, for one ending."""
    return {composed(path.stem): path for path in visible(directory.glob(f"*{ending}"))}


def find(
    directory: pathlib.Path, endings: tuple[str, ...], problems: list[str]
) -> Found:
    """The files below a folder; complains of links, and of names that are not UTF-8.

    Args:
      directory: an existing folder.
      endings: those of files to read, in lower case.
      problems: one line is added for each kind.
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
                f"{folder}: by a link the same folder as {entered[real]}; remove the "
                "link"
            )
            continue
        if folder != directory and root.is_relative_to(real):
            problems.append(
                f"{folder}: a link to {real}, which holds {directory}; remove the link"
            )
            continue
        entered[real] = folder
        for path in sorted(folder.iterdir()):
            if is_hidden(path):
                hidden.append(path)
            elif not _is_utf8(path.name):
                strange.append(str(path))
            elif path.is_dir():
                folders.append(path)
            elif path.suffix.lower() not in endings:
                unread.append(path)
            elif path.is_file():
                read.append(path)
            else:
                problems.append(f"{path}: no file; {_why_not(path)}")
    if strange:
        problems.append(
            f"{directory}: {len(strange)} names are not UTF-8: {shorten(strange)}; "
            "rename them, or unpack the archive with its own encoding"
        )
    return Found(tuple(sorted(read)), tuple(sorted(unread)), tuple(sorted(hidden)))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why_not(path: pathlib.Path) -> str:
    if path.is_symlink():
        return f"a symbolic link to {os.readlink(path)}, which is not there"
    return "a pipe or device; remove it"
