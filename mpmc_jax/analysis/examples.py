"""What figures take from several runs: a common data set, its images and classes."""

from collections.abc import Sequence

import numpy as np

from mpmc_jax.analysis.base import SavedRun
from mpmc_jax.data.dataset import DatasetFacts, EvalDataset
from mpmc_jax.experiments.run import open_split

# Separates names in an option; a comma separates the options themselves.
_SEPARATOR = "+"


def open_common(runs: Sequence[SavedRun], split: str = "val") -> EvalDataset:
    """Opens the labeled images of a split of the data set that all runs share.

    Raises:
      ValueError: two runs were trained on different data sets; or see `open_split`.
      FileNotFoundError: see `open_split`.
    """
    first, *others = runs
    facts = first.restored.facts
    for other in others:
        found = other.restored.facts
        if found.fingerprint != facts.fingerprint:
            raise ValueError(
                f"{first.name} was trained on {facts.dataset} "
                f"({facts.fingerprint[:8]}) and {other.name} on {found.dataset} "
                f"({found.fingerprint[:8]}); give runs of one data set"
            )
    return open_split(first.restored, split)


def choose_images(dataset: EvalDataset, count: int, ids: str) -> list[int]:
    """Chooses images by their ids, or the first `count`.

    Args:
      dataset: the images.
      count: how many to choose where none is named.
      ids: ids separated by "+"; "" for the first images.

    Returns:
      Indices of `dataset`.

    Raises:
      ValueError: an unknown id, or a count below 1.
    """
    if not ids:
        if count < 1:
            raise ValueError(f"images={count}: at least 1 is needed")
        return list(range(min(count, len(dataset))))
    chosen = ids.split(_SEPARATOR)
    for name in chosen:
        if name not in dataset.ids:
            raise ValueError(
                f"ids={ids}: no labeled image {name!r}; the first ones are "
                f"{', '.join(dataset.ids[:5])}"
            )
    return [dataset.ids.index(name) for name in chosen]


def choose_classes(facts: DatasetFacts, names: str) -> list[int]:
    """Returns the classes that an option names, or all.

    Args:
      facts: facts of the data set.
      names: class names separated by "+"; "" for all.

    Raises:
      ValueError: an unknown class; the message lists the valid ones.
    """
    if not names:
        return list(range(facts.num_classes))
    chosen = names.split(_SEPARATOR)
    for name in chosen:
        if name not in facts.class_names:
            raise ValueError(
                f"classes={names}: {name!r} is unknown; valid: "
                f"{', '.join(facts.class_names)}; join several with {_SEPARATOR}"
            )
    return [facts.class_names.index(name) for name in chosen]


def join_names(facts: DatasetFacts, present: np.ndarray) -> str:
    """Joins the names of the classes that are True in (C,), as options have them."""
    return _SEPARATOR.join(facts.class_names[i] for i in np.flatnonzero(present))
