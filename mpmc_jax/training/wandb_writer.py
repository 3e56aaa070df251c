"""Writes a run's metrics to Weights & Biases (optional)."""

import contextlib
import importlib
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mpmc_jax.training.metric_writer import Picture

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
    run's directory.

    Args:
      project: name of the project.
      workdir: the run's directory, whose name the run gets.
      settings: the run's configuration.
    """

    def __init__(self, project: str, workdir: Path, settings: Mapping[str, Any]):
        self._wandb = load_wandb()
        path = workdir / _ID
        if not path.exists():
            path.write_text(secrets.token_hex(8))
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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        self._run.log({"step": step, **values})

    def write_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Sends pictures by name."""
        images = {
            name: self._wandb.Image(Image.open(io.BytesIO(picture.png)))
            for name, picture in pictures.items()
        }
        self._run.log({"step": step, **images})

    def flush(self) -> None:
        """Does nothing: wandb sends what it has from a process of its own."""

    def close(self) -> None:
        """Waits until all is sent."""
        with contextlib.suppress(Exception):  # wandb's errors have no common class
            self._run.finish()
