"""Writes a run's metrics to Weights & Biases (optional)."""

import contextlib
import importlib
import io
import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mpmc_jax.text import first_line
from mpmc_jax.training.metric_writer import Picture

_LOG = logging.getLogger(__name__)

# In the run's directory: a resumed run continues the same lines.
_ID = "wandb_id.txt"


def load_wandb() -> Any:
    """Imports wandb.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"train.wandb needs wandb, which cannot be imported ({error}); "
            "`pip install '.[wandb]'` installs it"
        ) from error


class WandbWriter:
    """Writes to a run of a project; see `metric_writer.Writer`.

    Whether it is online is wandb's own setting: WANDB_MODE=offline keeps all in the
    run's directory. What wandb does not take is left out, with one warning.

    Args:
      project: name of the project.
      workdir: the run's directory, whose name the run gets.
      settings: the run's configuration.

    Raises:
      ValueError: wandb does not start a run, as without a login.
    """

    def __init__(self, project: str, workdir: Path, settings: Mapping[str, Any]):
        self._wandb, self._warned = load_wandb(), False
        path = workdir / _ID
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        try:
            self._run = self._wandb.init(
                project=project,
                name=workdir.absolute().name,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(settings),
            )
            # wandb's own counter may not go back, as after a run that was resumed.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb's errors have no common class
            raise ValueError(
                f"train.wandb={project!r}: wandb starts no run ({first_line(error)}); "
                "`wandb login`, set WANDB_MODE=offline, or leave train.wandb out"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        with self._warning_once(step):
            self._run.log({"step": step, **values})

    def write_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Sends pictures by name."""
        with self._warning_once(step):
            images = {
                name: self._wandb.Image(Image.open(io.BytesIO(picture.png)))
                for name, picture in pictures.items()
            }
            self._run.log({"step": step, **images})

    @contextlib.contextmanager
    def _warning_once(self, step: int) -> Iterator[None]:
        """Turns errors of wandb into a warning, the first time."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                _LOG.warning(
                    "wandb did not take step %d (%s); metrics.jsonl and TensorBoard "
                    "have all steps. This is said once",
                    step,
                    first_line(error),
                )
            self._warned = True

    def flush(self) -> None:
        """Does nothing: wandb sends what it has from a process of its own."""

    def close(self) -> None:
        """Waits until all is sent."""
        with contextlib.suppress(Exception):  # wandb's errors have no common class
            self._run.finish()
