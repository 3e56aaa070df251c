"""Warns where pseudo-labels lose a class that the labels have.

A method that learns from its own predictions can unlearn a class: a teacher that
misses it labels its pixels as background with confidence, and the loss keeps falling.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

_LOG = logging.getLogger(__name__)

# A class is gone where its share of the confident pseudo-labels is below this part of
# its share of the labels.
_GONE = 0.01
# Fewer confident pixels than this share teach little, and are of the easiest classes.
# Runs that unlearned their foreground had 0.6 and more (results/mean_teacher_acdc), the
# quick start, which learns all its classes, less than 0.15.
_FEW = 0.25


class ClassWatch:
    """Compares the shares of every class, and warns once about each that is gone.

    Shares are compared over windows of a tenth of the run (10 to 1000 steps), so that a
    class that a few batches happen to lack does not matter. The first window begins
    after the first tenth of the run and after the ramp-up: before that, a network is
    confident of the most common classes alone. A window of few confident
    pseudo-labels is skipped.

    Args:
      classes: names of the classes.
      start: steps made already; a window that began before them is skipped.
      steps: length of the run.
      rampup: steps over which the weight of the unlabeled loss grows.
    """

    def __init__(
        self, classes: Sequence[str], start: int, steps: int, rampup: int = 0
    ) -> None:
        self._classes = list(classes)
        self._window = min(max(steps // 10, 10), 1000)
        self._grace = max(steps // 10, rampup)
        self._step = start
        self._warned: set[str] = set()
        self._begin_window()

    def _begin_window(self) -> None:
        self._begin = self._step
        self._sums = {
            kind: np.zeros(len(self._classes)) for kind in ("label", "pseudo")
        }
        self._confident = 0.0

    def add(self, shares: Mapping[str, np.ndarray], confident: float) -> None:
        """Adds a step.

        Args:
          shares: of the classes, (c,) by kind; NaN where nothing was counted.
          confident: the share of the pixels that have a pseudo-label.
        """
        self._confident += confident / self._window
        for kind, sums in self._sums.items():
            sums += np.nan_to_num(shares.get(kind, 0.0))
        self._step += 1
        if self._step % self._window:
            return
        if self._begin >= self._grace and self._step - self._begin == self._window:
            self._judge()
        self._begin_window()

    def _judge(self) -> None:
        label, pseudo = self._sums["label"], self._sums["pseudo"]
        if not label.sum() or not pseudo.sum() or self._confident < _FEW:
            return
        label, pseudo = label / label.sum(), pseudo / pseudo.sum()
        gone = {
            name: f"{name} ({of_labels:.2g} of the labels, {of_pseudo:.2g} of these)"
            for name, of_labels, of_pseudo in zip(
                self._classes, label, pseudo, strict=True
            )
            if of_pseudo < _GONE * of_labels and name not in self._warned
        }
        if not gone:
            return
        self._warned.update(gone)
        _LOG.warning(
            "steps %d to %d: confident pseudo-labels miss classes: %s. If the score "
            "of a class stays 0, begin again in a new --workdir with "
            "--config.method.rampup=-1, --config.mpmc.alpha=0.1 or (not for augseg, "
            "u2pl and ael) --config.method.unlabeled_loss=dice",
            self._begin + 1,
            self._step,
            ", ".join(gone.values()),
        )
