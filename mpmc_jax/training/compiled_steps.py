"""The compiled programs of a run: one for each phase of its method."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from mpmc_jax.methods.base import Method
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.train_step import make_step

_LOG = logging.getLogger(__name__)


class Programs:
    """The step of each phase of the method, compiled at its first use."""

    def __init__(self, parallel: Parallel, config: StepConfig) -> None:
        self._parallel, self._config = parallel, config
        self._compiled: dict[Method, Callable[..., Any]] = {}

    def _phase(self, step: int) -> Method:
        return self._config.method.phase(step // self._config.steps_per_epoch)

    def needs_compiling(self, step: int) -> bool:
        """Whether the program of that step is not compiled yet."""
        return self._phase(step) not in self._compiled

    def begins_phase(self, step: int) -> bool:
        """Whether that step is the first of a phase."""
        return self._phase(step) != self._phase(step - 1)

    def get(self, step: int) -> Callable[..., Any]:
        """Returns the program of that step, and compiles it if needed."""
        method = self._phase(step)
        if method not in self._compiled:
            which = "next phase's step" if self._compiled else "step"
            _LOG.info("compiling the %s; on a CPU this takes minutes", which)
            config = dataclasses.replace(self._config, method=method)
            self._compiled[method] = self._parallel.compile(make_step(config))
        return self._compiled[method]
