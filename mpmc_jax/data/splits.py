"""Splits of the training images into labeled and unlabeled ones.

A split is read from two published id lists, or drawn from a seed so that every class
occurs among the labeled images. Images without a mask can only be unlabeled.
"""

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from mpmc_jax.atomic_write import write_text
from mpmc_jax.data import lists
from mpmc_jax.text import quantity, shorten


@dataclasses.dataclass(frozen=True)
class Split:
    """The ids of the labeled and of the unlabeled training images, in order."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]

    @property
    def crc32(self) -> int:
        """A checksum of both lists and their order."""
        return zlib.crc32(repr((self.labeled, self.unlabeled)).encode())

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes labeled.txt and unlabeled.txt, one id per line."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("labeled", "unlabeled"):
            ids = getattr(self, name)
            write_text(folder / f"{name}.txt", "".join(f"{key}\n" for key in ids))


def count_labeled(split: str, available: int) -> int:
    """Returns the number of labeled images that "1_16", "full" or "30" stands for.

    Fractions are rounded up, as in the published splits (1/16 of 10582 is 662).

    Args:
      split: a fraction, a number or "full".
      available: number of images with a mask.

    Raises:
      ValueError: `split` is none of these, zero, or more than available.
    """
    if split == "full":
        return available
    try:
        numerator, *denominator = (int(part) for part in split.split("_"))
        if len(denominator) > 1 or 0 in denominator or numerator < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"data.split={split!r} is unknown; valid: a fraction such as 1_16, a "
            "number of labeled images such as 30, full"
        ) from None
    count = numerator
    if denominator:
        count = math.ceil(available * numerator / denominator[0])
    if not count:
        raise ValueError(f"data.split={split!r} leaves no labeled image at all")
    if count > available:
        raise ValueError(
            f"data.split={split!r} asks for "
            f"{quantity(count, 'labeled image')}; only {available} training images "
            "have a mask"
        )
    return count


def draw_split(
    ids: Sequence[str], present: dict[str, tuple[int, ...]], split: str, seed: int
) -> Split:
    """Draws a split from a seed; both lists keep the order of `ids`.

    The labeled images cover every class that occurs, if there are enough of them: for
    each class not yet covered, rarest first, a random image with it is chosen. The rest
    is random. "full" labels every image with a mask, in a random order, and also keeps
    every image in the unlabeled list.

    Args:
      ids: the training images.
      present: id of each image with a mask -> the classes in it.
      split: see `count_labeled`.
      seed: an integer of at least 0.

    Raises:
      ValueError: see `count_labeled`; or no training image has a mask.
    """
    candidates = [key for key in ids if key in present]
    if not candidates:
        raise ValueError("no training image has a mask, so that none can be labeled")
    count = count_labeled(split, len(candidates))
    permutation = np.random.default_rng(seed).permutation(len(candidates))
    order = [candidates[i] for i in permutation]
    if split == "full":
        # An epoch pairs the two lists by position; an image should not meet itself.
        return Split(tuple(order), tuple(ids))
    chosen = _cover_classes(order, present, count)
    chosen |= set([key for key in order if key not in chosen][: count - len(chosen)])
    return Split(
        tuple(key for key in ids if key in chosen),
        tuple(key for key in ids if key not in chosen),
    )


def check_labels(
    name: str,
    ids: Mapping[str, Sequence[str]],
    present: Mapping[str, Sequence[int]],
) -> list[str]:
    """Returns one line for each split without a labeled image or pixel.

    Args:
      name: name of the data set.
      ids: split -> ids of its images.
      present: see `draw_split`.
    """
    problems = []
    for split, keys in ids.items():
        masks = [key for key in keys if key in present]
        if not masks:
            problems.append(
                f"{name}: no labeled image in split {split!r}; label more, or correct "
                f"the id lists ({split}.txt may be empty, or another may name all "
                "images)"
            )
        elif not any(present[key] for key in masks):
            problems.append(
                f"{name}: no labeled pixel in split {split!r}: the masks of "
                f"{shorten(masks)} are void throughout; label them, or name other "
                f"images in {split}.txt"
            )
    return problems


def absent_classes(
    labeled: Sequence[str],
    present: Mapping[str, Sequence[int]],
    names: Sequence[str],
) -> list[str]:
    """Returns the names of the classes that occur in none of the labeled images.

    Args:
      labeled: ids of the labeled images.
      present: see `draw_split`.
      names: the class names.
    """
    found = {label for key in labeled for label in present.get(key, ())}
    return [name for label, name in enumerate(names) if label not in found]


def check_classes(
    split: Split, present: dict[str, tuple[int, ...]], names: Sequence[str]
) -> None:
    """Raises ValueError if a class occurs in none of a split's labeled images.

    Args:
      split: the split to check.
      present: see `draw_split`.
      names: the class names.
    """
    absent = absent_classes(split.labeled, present, names)
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} classes occur in none of the "
            f"{quantity(len(split.labeled), 'labeled image')} and could not be "
            f"learned: {shorten(absent)}; label more images (data.split, "
            "data.labeled_ids), remove these classes, or pass "
            "--config.data.allow_absent_classes=True"
        )


def _cover_classes(
    order: list[str], present: dict[str, tuple[int, ...]], count: int
) -> set[str]:
    """Chooses an image for each class not yet covered, rarest class first.

    Args:
      order: ids; the first one that has a class is chosen.
      present: see `draw_split`.
      count: the most images to choose.
    """
    frequency: dict[int, int] = {}
    for key in order:
        for label in present[key]:
            frequency[label] = frequency.get(label, 0) + 1
    chosen: set[str] = set()
    covered: set[int] = set()
    for label in sorted(frequency, key=lambda c: (frequency[c], c)):
        if label not in covered and len(chosen) < count:
            key = next(key for key in order if label in present[key])
            chosen.add(key)
            covered |= set(present[key])
    return chosen


def read_split(
    ids: Sequence[str],
    present: dict[str, tuple[int, ...]],
    labeled_path: str,
    unlabeled_path: str,
) -> Split:
    """Reads a split from published id lists, in either format of `lists`.

    Args:
      ids: the training images of the data set.
      present: see `draw_split`.
      labeled_path: list of the labeled images.
      unlabeled_path: list of the unlabeled images; "" for all other training images.

    Raises:
      FileNotFoundError: a list does not exist.
      ValueError: a list holds unknown or repeated ids or overlaps the other; the
        labeled one is empty or holds an image without a mask.
    """
    labeled = read_ids(labeled_path, ids)
    if not labeled:
        raise ValueError(f"{labeled_path}: empty list, so that no image is labeled")
    bare = [key for key in labeled if key not in present]
    if bare:
        raise ValueError(
            f"{labeled_path}: labeled images without mask: {shorten(bare)}"
        )
    chosen = set(labeled)
    if not unlabeled_path:
        return Split(labeled, tuple(key for key in ids if key not in chosen))
    unlabeled = read_ids(unlabeled_path, ids)
    both = [key for key in unlabeled if key in chosen]
    if both:
        raise ValueError(
            f"{labeled_path} and {unlabeled_path} overlap in {len(both)} ids: "
            f"{shorten(both)}; an image is labeled or unlabeled (data.split=full "
            "makes every image both, without lists)"
        )
    return Split(labeled, unlabeled)


def read_ids(path: str, known: Sequence[str]) -> tuple[str, ...]:
    """Reads the ids of a list, in either format of `lists`, in the list's order.

    Raises:
      FileNotFoundError: the list does not exist.
      ValueError: it holds ids that are not in `known`, or repeated ones.
    """
    lines = lists.read_lines(pathlib.Path(path))
    known_set = frozenset(known)
    found = [lists.resolve(line, known_set) for line in lines]
    absent = [line for line, key in zip(lines, found, strict=True) if key is None]
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of {len(lines)} lines name no training image of "
            f"this data set: {shorten(absent)}"
        )
    ids = [key for key in found if key is not None]
    again = lists.repeated(ids)
    if again:
        raise ValueError(f"{path}: repeats {len(again)} ids: {shorten(again)}")
    return tuple(ids)
