"""Planned runs and the folder of their results, as `launch.experiments` makes them."""

import json

from launch.experiments import __main__ as experiments
from mpmc_jax.experiments.paper.results import Place


def place_of(folder, *flags):
    """The folder of runs that are planned with these flags; their data is beside it.

    A data set that a user prepared in the checkout is not theirs.
    """
    flags = (f"--config.data.data_dir={folder / 'data'}", *flags)
    return Place(folder, lambda run: experiments._configuration(run.flags(flags)))


def write_run(place, run, scores, steps=20, changes=None, data=None, **classes):
    """The files of a run that was evaluated every five steps."""
    config = place.configure(run)
    config.train.steps = steps
    config.update_from_flattened_dict(changes or {})
    directory = place.workdir(run)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    manifest = {"steps_per_epoch": 7, "data": {"labeled": 4} | (data or {})}
    manifest["device_kind"] = "cpu"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"step": 5, "train/loss": 1.0}]
    for count, score in enumerate(scores, 1):
        line = {"step": 5 * count, "val/miou": score}
        lines.append(line | {f"val/iou/{k}": v[count - 1] for k, v in classes.items()})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 25, "val/mi')
