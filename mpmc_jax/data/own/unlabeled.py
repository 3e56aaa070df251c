"""Finds unlabeled images outside a user's folder: a folder tree, a pattern, a list."""

import glob
import pathlib
from collections.abc import Collection

from mpmc_jax.data import lists
from mpmc_jax.data.lists import IMAGE_SUFFIXES, composed
from mpmc_jax.data.own import layout
from mpmc_jax.text import quantity, shorten


def find(
    text: str,
    labeled: Collection[pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> dict[str, pathlib.Path]:
    """Returns id -> image, where an id begins with the name of the folder.

    Args:
      text: a folder, whose subfolders are read too; a pattern as of a shell, with **
        for any folders; or a text file with one path per line, relative to that file.
      labeled: images that are left out, because they have masks.
      problems: gets one line for each problem.
      notes: gets a line if images are left out.
    """
    path = pathlib.Path(text)
    if path.is_dir():
        found = list(layout.collect(path, problems, notes).values())
    elif path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        found = _listed(path, problems)
    else:
        matched = sorted(map(pathlib.Path, glob.glob(text, recursive=True)))
        found = [each for each in matched if each.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        problems.append(
            f"--unlabeled={text}: no image {IMAGE_SUFFIXES}; give a folder, a quoted "
            "pattern or a text file of paths"
        )
    known = {path.resolve() for path in labeled}
    others = [each for each in found if each.resolve() not in known]
    if len(others) < len(found):
        count = quantity(len(found) - len(others), "image")
        notes.append(f"--unlabeled={text}: {count} left out that have masks")
    root = path if path.is_dir() else _common(others)
    ids: dict[str, pathlib.Path] = {}
    for each in others:
        below = each.relative_to(root).with_suffix("").as_posix()
        key = composed(f"{root.resolve().name}/{below}")
        if key in ids:
            problems.append(f"{each}: {ids[key].name} has the same id {key!r}")
        ids[key] = each
    return ids


def _listed(path: pathlib.Path, problems: list[str]) -> list[pathlib.Path]:
    try:
        found = [path.parent / line for line in lists.read_paths(path)]
    except ValueError as error:
        problems.append(str(error))
        return []
    absent = [str(each) for each in found if not each.is_file()]
    if absent:
        problems.append(f"{path}: names absent files: {shorten(absent)}")
    return [each for each in found if each.is_file()]


def _common(paths: list[pathlib.Path]) -> pathlib.Path:
    """Returns the deepest folder that holds all paths."""
    folders = [each.parent for each in paths]
    root = folders[0] if folders else pathlib.Path()
    while not all(each.is_relative_to(root) for each in folders):
        root = root.parent
    return root
