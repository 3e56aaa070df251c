"""The evaluation whose scores a table compares with published values.

Where training evaluates in another way, `launch.evaluate` evaluates the best checkpoint
of a finished run once more, and its result stays in the run's directory.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.experiments.paper.results import Outcome, Place, read_outcome

# (data set, method) -> the protocol of the published values, where the authors chose
# checkpoints by another one.
_PROTOCOLS = {("cityscapes", "u2pl"): "slide_u2pl", ("cityscapes", "ael"): "slide_ael"}


@dataclasses.dataclass(frozen=True)
class FinalEvaluation:
    """An evaluation of the best checkpoint, without padding images to other sizes.

    Attributes:
      protocol: one of `evaluation.protocols.PROTOCOLS`; "" for that of training.
    """

    protocol: str

    @property
    def label(self) -> str:
        """What it is, for a reader of a table."""
        return self.protocol or "images without padding"

    @property
    def flags(self) -> tuple[str, ...]:
        """The arguments of `launch.evaluate` besides the run's directory."""
        protocol = (f"--protocol={self.protocol}",) if self.protocol else ()
        return ("--checkpoint=best", *protocol)

    @property
    def file_name(self) -> str:
        """The name of the file that `launch.evaluate` writes with these arguments."""
        return f"eval_val_best{'_' if self.protocol else ''}{self.protocol}.json"


def final_evaluation(config: ml_collections.ConfigDict) -> FinalEvaluation | None:
    """Returns the evaluation of a run as published; None if training's is that one."""
    used = make_protocol(config)
    method = config.data.name, config.method.name
    published = _PROTOCOLS.get(method, used.name)
    if published != used.name:
        return FinalEvaluation(published)
    is_padded = config.eval.pad_to != 0 and used.whole_images
    return FinalEvaluation("") if is_padded else None


def read_scores(
    evaluation: FinalEvaluation, outcome: Outcome, directory: Path
) -> Mapping[str, float]:
    """Reads the scores of a run's final evaluation.

    Args:
      evaluation: the evaluation.
      outcome: what is known about the run.
      directory: the run's directory.

    Returns:
      Scores by the names of training's evaluations, such as "val/miou"; empty if there
      is no result, or it is of another checkpoint than the run's best.
    """
    try:
        found = json.loads((directory / evaluation.file_name).read_text())
        scalars, step, pad_to = found["scalars"], found["step"], found["pad_to"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    scores = {line["step"]: line[outcome.metric] for line in outcome.evaluations}
    if pad_to or scores.get(step) is None or scores[step] != outcome.best():
        return {}
    return {
        f"val/{name}": math.nan if value is None else float(value)
        for name, value in scalars.items()
    }


def is_due(run: PlannedRun, place: Place) -> bool:
    """Whether a run is finished, and its final evaluation has no result yet."""
    evaluation = final_evaluation(place.configure(run))
    outcome = read_outcome(run, place)
    if evaluation is None or outcome.state != "finished":
        return False
    if math.isnan(outcome.best()):  # There is no best checkpoint.
        return False
    return not read_scores(evaluation, outcome, place.workdir(run))
