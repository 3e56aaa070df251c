"""Which training images give their labels and which do not.

A split comes from two published id lists, or is drawn from a seed such that every class
occurs among the labeled images. Without a mask an image can only be unlabeled.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mpmc_jax.atomic_write import write_text
from mpmc_jax.data import lists
from mpmc_jax.data.lists import shorten
from mpmc_jax.text import quantity


@dataclasses.dataclass(frozen=True)
class Split:
    """Ids of the labeled and of the unlabeled training images, in order."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes labeled.txt and unlabeled.txt: bare ids, one a line."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("labeled", "unlabeled"):
            ids = getattr(self, name)
            write_text(folder / f"{name}.txt", "".join(f"{key}\n" for key in ids))


def count_labeled(split: str, available: int) -> int:
    """Number of labeled images that "1_16", "full" or "30" asks of `available`.

    Fractions round up, as in the published splits (1/16 of 10582 is 662).

    Raises:
      ValueError: not such a text; zero; or more than are available.
    """
    if split == "full":
        return available
    try:
        numerator, *denominator = (int(part) for part in split.split("_"))
        if len(denominator) > 1 or 0 in denominator or numerator < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"data.split={split!r} is none of: a fraction such as 1_16, a number of "
            "labeled images such as 30, full"
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
    """Draws a split from a seed; each half keeps the order of `ids`.

    Every class that occurs at all occurs among the labeled images if their number
    allows: classes are served rarest first, each by a random image that has it.
    "full" labels everything, in a drawn order, and leaves every image in the unlabeled
    list as well.

    Args:
      ids: the training images.
      present: id of each image with a mask -> the classes in it.
      split: see `count_labeled`.
      seed: any integer from 0.

    Raises:
      ValueError: see `count_labeled`.
    """
    candidates = [key for key in ids if key in present]
    if not candidates:
        raise ValueError("no training image has a mask: no labeled image at all")
    count = count_labeled(split, len(candidates))
    permutation = np.random.default_rng(seed).permutation(len(candidates))
    order = [candidates[i] for i in permutation]
    if split == "full":
        # An epoch pairs the lists place by place: no image shall meet itself.
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
    """Complains of splits in which nothing is labeled, one line each.

    Args:
      name: of the data set.
      ids: split -> its images.
      present: see `draw_split`.
    """
    problems = []
    for split, keys in ids.items():
        masks = [key for key in keys if key in present]
        if not masks:
            problems.append(
                f"{name}: no labeled image in split {split!r}; label more, or mend the "
                f"id lists ({split}.txt may be empty, or another names all images)"
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
    """Names of the classes that no mask of these images holds; see `draw_split`."""
    found = {label for key in labeled for label in present.get(key, ())}
    return [name for label, name in enumerate(names) if label not in found]


def check_classes(
    split: Split, present: dict[str, tuple[int, ...]], names: Sequence[str]
) -> None:
    """Refuses a split whose labeled images lack a class altogether.

    Args:
      split: its labeled ids are looked at.
      present: see `draw_split`.
      names: of the classes.

    Raises:
      ValueError: names the classes, and the mend.
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
    """The first image of `order` for each class not yet covered, rarest class first."""
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
    """Reads published id lists, of either format (see `lists`).

    Args:
      ids: the training images of the data set.
      present: see `draw_split`.
      labeled_path: list of the labeled images.
      unlabeled_path: list of the others; "" means all other training images.

    Raises:
      FileNotFoundError: a list does not exist.
      ValueError: a list names absent ids, repeats ids, overlaps the other, names an
        image without a mask as labeled, or no labeled image is left.
    """
    labeled = read_ids(labeled_path, ids)
    if not labeled:
        raise ValueError(f"{labeled_path}: empty list; no labeled image at all")
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
    """The ids that a list of either format names, in its order.

    Raises:
      FileNotFoundError: there is no such list.
      ValueError: it names ids that are not in `known`, or repeats some.
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
