"""Assigns a user's images to training, validation and test; see `folder`.

The first of these that exists decides, for each split by itself:

    val, test    val.txt, test.txt; else images/val/, images/test/ (any of `_FOLDERS`)
    train        train.txt; else images/train/ if images/val/ or images/test/ exists;
                 else every image that is in no other split

Training images are then divided:

    labeled.txt     lists the images whose masks are used
    unlabeled.txt   lists the images whose masks are not used, and the images of
                    unlabeled/ that are; images in neither list are unused
    only one list   the other images are in the missing one; unlabeled.txt then has all
                    of unlabeled/

If nothing decides val, a tenth of the labeled images is held out, by the hash of ids.
"""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Collection, Mapping, Sequence

from mpmc_jax.data import lists
from mpmc_jax.text import quantity, shorten

_HELD_OUT = 10
# A validation split below this many images is told to be small.
_FEW = 8
# First folder below images/ -> split.
_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# The id lists that a folder may have beside its images.
LISTS = ("train", "val", "test", "labeled", "unlabeled")


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The ids of a user's images by split, in order.

    Attributes:
      labeled: training images whose masks are used.
      unlabeled: training images whose masks, if any, are not used.
      held_out: "val", and "test" if there is one -> ids.
      notes: what is right but may surprise, one line each.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    held_out: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def assign(
    directory: pathlib.Path,
    ids: list[str],
    unlabeled_ids: list[str],
    problems: list[str],
) -> Assigned:
    """Assigns every image to a split.

    Args:
      directory: the folder of the lists.
      ids: ids of the images below images/, sorted.
      unlabeled_ids: ids of the images below unlabeled/, sorted.
      problems: gets one line for each problem.
    """
    named, origins = _read_all(directory, ids, unlabeled_ids, problems)
    _report_shared(directory, named, origins, problems)
    val, test = named.get("val"), named.get("test")
    out = {*(val or ()), *(test or ())}
    taken = out | set(named.get("unlabeled", ()))
    pool = [key for key in named.get("train", ids) if key not in out]
    labeled = named.get("labeled", [key for key in pool if key not in taken])
    unlabeled = named.get("unlabeled")
    if unlabeled is None:
        rest = [] if "labeled" not in named else pool
        unlabeled = [key for key in rest if key not in set(labeled)] + unlabeled_ids
    notes = []
    if val is None:
        val = _hold_out(labeled)
        labeled = [key for key in labeled if key not in set(val)]
        notes.append(
            f"{directory}: no val.txt; {quantity(len(val), 'labeled image')} held "
            f"out for validation: {shorten(val)}{_advice(val)}"
        )
        if val and not labeled:
            problems.append(
                f"{directory}: only one labeled image for training and validation "
                f"({shorten(val)}), and each needs its own; add another with its mask"
            )
    used = {*labeled, *unlabeled, *val, *out}
    notes += _note_unused(directory, ids, unlabeled_ids, used, origins)
    held_out = {"val": tuple(val)}
    if test is not None:
        held_out["test"] = tuple(test)
    return Assigned(tuple(labeled), tuple(unlabeled), held_out, tuple(notes))


def _read_all(
    directory: pathlib.Path,
    ids: list[str],
    unlabeled_ids: list[str],
    problems: list[str],
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Reads ids by list or split, and the names of these for messages."""
    named: dict[str, list[str]] = {}
    origins: dict[str, str] = {}
    for name in LISTS:
        path = directory / f"{name}.txt"
        if path.is_file():
            known = ids if name != "unlabeled" else [*ids, *unlabeled_ids]
            named[name] = _read_list(path, known, unlabeled_ids, problems)
            origins[name] = path.name
    folders = _by_folder(ids)
    if not {"val", "test"} & folders.keys():
        folders.pop("train", None)
    for split, keys in folders.items():
        if split not in named:
            named[split] = keys
            origins[split] = f"images/{keys[0].partition('/')[0]}/"
    return named, origins


def _by_folder(ids: list[str]) -> dict[str, list[str]]:
    """Returns the ids in the folder of each split."""
    found: dict[str, list[str]] = {}
    for key in ids:
        folder, _, rest = key.partition("/")
        split = _FOLDERS.get(folder.lower()) if rest else None
        if split is not None:
            found.setdefault(split, []).append(key)
    return found


def _read_list(
    path: pathlib.Path,
    ids: list[str],
    unlabeled_ids: Collection[str],
    problems: list[str],
) -> list[str]:
    """Reads the ids of a list; unknown ones are problems."""
    try:
        lines = lists.read_lines(path)
    except ValueError as error:
        problems.append(str(error))
        return []
    known = frozenset(ids)
    found = [lists.resolve(line, known) for line in lines]
    absent = [line for line, key in zip(lines, found, strict=True) if key is None]
    without_mask = [
        line for line in absent if lists.resolve(line, frozenset(unlabeled_ids))
    ]
    if without_mask:
        problems.append(
            f"{path}: names images without a mask: {shorten(without_mask)}; lists name "
            "labeled images, and only unlabeled.txt may name those of unlabeled/"
        )
    absent = [line for line in absent if line not in without_mask]
    if absent:
        problems.append(
            f"{path}: names absent files: {shorten(absent)}; add them, or remove "
            "them from the list"
        )
    present = [key for key in found if key is not None]
    return lists.unique(present, path, problems)


def _report_shared(
    directory: pathlib.Path,
    named: Mapping[str, list[str]],
    origins: Mapping[str, str],
    problems: list[str],
) -> None:
    """Adds problems for images in two lists or splits.

    Only train.txt may share images with labeled.txt and unlabeled.txt.
    """
    for one, other in itertools.combinations(named, 2):
        both = sorted(set(named[one]) & set(named[other]))
        if both and not (one == "train" and other in ("labeled", "unlabeled")):
            problems.append(
                f"{directory}: {origins[one]} and {origins[other]} share "
                f"{shorten(both)}; remove them from one"
            )
    outside = sorted(set(named.get("labeled", ())) - set(named.get("train", ())))
    if "train" in named and outside:
        problems.append(
            f"{directory}: labeled.txt names images that {origins['train']} lacks: "
            f"{shorten(outside)}"
        )


def _advice(val: Sequence[str]) -> str:
    """What to do about a validation split of few images; "" for one of many."""
    if len(val) >= _FEW:
        return ""
    return "; scores of so few images say little: list more in val.txt"


def _hold_out(labeled: list[str]) -> list[str]:
    """Chooses a tenth of the labeled images by hash; keeps their order."""
    order = sorted(labeled, key=lambda key: hashlib.sha256(key.encode()).digest())
    chosen = set(order[: max(len(order) // _HELD_OUT, 1)])
    return [key for key in labeled if key in chosen]


def _note_unused(
    directory: pathlib.Path,
    ids: list[str],
    unlabeled_ids: list[str],
    used: set[str],
    origins: Mapping[str, str],
) -> list[str]:
    notes = []
    for folder, keys in (("images", ids), ("unlabeled", unlabeled_ids)):
        unused = [key for key in keys if key not in used]
        if unused:
            notes.append(
                f"{directory}: {quantity(len(unused), 'image')} of {folder}/ in none "
                f"of {shorten([*origins.values()])} and not used: {shorten(unused)}"
            )
    return notes
