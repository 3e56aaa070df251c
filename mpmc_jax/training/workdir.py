"""A run's directory: its files, and the settings that a resumed run may not change."""

import json
import logging
from pathlib import Path
from typing import Any

import ml_collections

from mpmc_jax.atomic_write import write_json
from mpmc_jax.training.checkpoint.integrity import differences

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"

# What shows that a folder holds images or a prepared data set; in lower case.
_DATA = ("classes.json", "dataset_info.json", "images", "masks")

# Settings that may change when a run resumes: they decide how it computes, not what;
# but for train.eval_every, see `fixed_settings`.
_MAY_CHANGE = (
    "data.data_dir",
    "data.resident",
    "data.threads",
    "data.prefetch",
    "train.devices",
    "train.parallel",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.patience",
    "train.keep",
    "train.panels",
    "train.wandb",
    "eval.batch_size",
)
# Those that may also differ between the processes of one run.
MAY_DIFFER_BETWEEN_PROCESSES = ("data.data_dir", "data.threads", "data.prefetch")

# Settings that older runs of this format version lack, and what those runs did.
_LATER = {
    "model.freeze": "",
    "model.drop_path": 0.0,
    "model.attention": "xla",
    "optimizer.name": "sgd",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "imbalance.class_weights": [],
    "imbalance.focal_gamma": 2.0,
    "imbalance.crop_probability": 0.0,
    "imbalance.crop_classes": [],
    "imbalance.thresholds": [],
    "eval.best_metric": "auto",
    "fixmatch.teacher": "student",
    "cps.weight": 1.0,
    "cps.plain_weight": 1.5,
    "mpmc.lambda_m_scale": "none",
    "mpmc.detach": "none",
    "mpmc.shuffle": False,
    "mpmc.uniform": False,
    "mpmc.gate": 0.0,
    "mpmc.temperature": 1.0,
}
# Values that older runs of this format version have, and what they are called now.
_RENAMED = {"model.remat": {False: "off", True: "all"}}


class WorkdirError(RuntimeError):
    """The directory belongs to another run; the message shows the difference."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Adds settings that a saved configuration lacks, with what its run did.

    Values that have other names now are renamed.
    """
    whole, later, flat = dict(config), dict(_LATER), flatten(config)
    if flat.get("method.name") == "cps" and flat.get("method.cutmix") is False:
        # Before it had a weight of its own, CPS without CutMix had that of CPS with it.
        later["cps.plain_weight"] = flat.get("cps.weight", later["cps.weight"])
    for name, value in later.items():
        section, _, key = name.partition(".")
        if isinstance(given := whole.get(section, {}), dict):
            whole[section] = {key: value, **given}
    for name, names in _RENAMED.items():
        section, _, key = name.partition(".")
        given = whole.get(section)
        if isinstance(given, dict) and isinstance(given.get(key), bool):
            whole[section] = {**given, key: names[given[key]]}
    return whole


def complete_data(data: dict[str, Any]) -> dict[str, Any]:
    """Adds what a saved description of data lacks: no value stood for missing data."""
    pixels = data.get("pixels")
    if not isinstance(pixels, dict) or not isinstance(pixels.get("low"), list):
        return data
    later = {"nodata": [], "nodata_fill": [0.0] * len(pixels["low"])}
    return {**data, "pixels": {**later, **pixels}}


def has_steps(workdir: Path) -> bool:
    """Whether a run saved a step there; a run that did not may be replaced."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(
        each.name.isdigit() or each.name.startswith("damaged-")
        for each in folder.iterdir()
    )


def check_not_data(workdir: Path) -> None:
    """Refuses a directory that holds data and no run.

    Raises:
      WorkdirError: the message names what was found and the fix.
    """
    if not workdir.is_dir():
        return
    names = {path.name.lower(): path.name for path in workdir.iterdir()}
    found = next((names[name] for name in _DATA if name in names), None)
    for depth in ("*", "*/*"):  # --workdir=data/NAME, --workdir=data
        prepared = next(workdir.glob(f"{depth}/dataset_info.json"), None)
        found = found or (prepared and str(prepared.relative_to(workdir)))
    if found is not None and not names.keys() & {CONFIG, CHECKPOINTS}:
        raise WorkdirError(
            f"--workdir={workdir} looks like a folder of data: it holds {found}. A run "
            "would write its files among them; give another --workdir, such as "
            f"--workdir=runs/{workdir.absolute().name}"
        )


def trained_on(
    config: ml_collections.ConfigDict, facts: dict[str, Any]
) -> dict[str, Any]:
    """Returns what may not change when a run resumes; its checkpoints store it.

    Args:
      config: the run's configuration; settings that may change are left out.
      facts: "data" and "steps_per_epoch".
    """
    fixed = json.loads(json.dumps(config.to_dict()))
    for name in _MAY_CHANGE:
        section, _, key = name.partition(".")
        del fixed[section][key]
    return {"config": fixed, **json.loads(json.dumps(facts))}


def fixed_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the settings that decide what a run trains, by dotted names.

    With `train.precise_bn`, `train.eval_every` is one of them: training goes on with
    batch norm's statistics as they are recomputed before each evaluation.
    """
    fixed = flatten(trained_on(config, {})["config"])
    if config.train.precise_bn > 0:
        fixed["train.eval_every"] = config.train.eval_every
    return fixed


def make(workdir: Path) -> None:
    """Makes the directory if it does not exist.

    Raises:
      WorkdirError: it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(workdir, error) from error


def check(
    workdir: Path, config: ml_collections.ConfigDict, facts: dict[str, Any]
) -> None:
    """Checks that the steps saved there are of this run; writes nothing.

    Settings that do not change the result may change: devices, threads, intervals
    (without `train.precise_bn`), the folder of the data. A file that is missing or
    damaged is logged and skipped: the checkpoint stores the same.

    Raises:
      WorkdirError: another configuration, other data or another format version; the
        message lists the differences.
    """
    if not has_steps(workdir):
        return
    run = trained_on(config, facts)
    path = workdir / CONFIG
    if (found := _read_beside(path)) is not None:
        _check_version(path, found, config.format_version)
        there, now = flatten(complete(found)), flatten(config.to_dict())
        fixed = fixed_settings(config)
        for name in (x for x in _MAY_CHANGE if x not in fixed):
            before, after = there.pop(name, now[name]), now[name]
            if before != after:
                _LOG.info("%s is %r from here on, not %r", name, after, before)
        _check_same(path, there, fixed, "the same settings")
    path = workdir / MANIFEST
    if (found := _read_beside(path)) is not None:
        there = {name: found.get(name) for name in facts}
        now = {name: run[name] for name in facts}
        _check_same(path, there, now, "the same data")


def write(
    workdir: Path,
    config: ml_collections.ConfigDict,
    facts: dict[str, Any],
    circumstances: dict[str, Any],
) -> None:
    """Writes config.json and manifest.json of a run that begins or resumes.

    The manifest of a run that has saved steps keeps its first entries, and "resumed"
    gets one more. A damaged file is kept next to the new one.

    Args:
      workdir: the run's directory.
      config: its configuration.
      facts: what may not change when a run resumes, see `trained_on`.
      circumstances: what may change: versions, devices, revision.

    Raises:
      WorkdirError: the directory cannot be written.
    """
    found = _read_beside(workdir / MANIFEST) if has_steps(workdir) else None
    manifest = {**circumstances, **facts, "resumed": []}
    if found is not None:
        changed = {k: v for k, v in circumstances.items() if k not in facts}
        manifest = {**found, "resumed": [*found["resumed"], changed]}
    try:
        for name, value in ((CONFIG, config.to_dict()), (MANIFEST, manifest)):
            path = workdir / name
            if path.exists() and _read_beside(path) is None:
                path.replace(path.with_name(f"{name}.damaged"))
            write_json(path, value)
    except OSError as error:
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: OSError) -> WorkdirError:
    if workdir.is_file():
        said = "it is a file; choose another"
    else:
        said = f"{error.strerror}; choose another or fix its permissions"
    return WorkdirError(f"cannot write to --workdir={workdir}: {said}")


def read_manifest(workdir: Path, run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads what `write` recorded about a run's data, versions and devices.

    Args:
      workdir: the run's directory.
      run: what its checkpoint was trained on, see `trained_on`; stands in for a
        manifest that is missing or damaged.

    Raises:
      WorkdirError: there is none, or it is of another run than the checkpoint.
    """
    path = workdir / MANIFEST
    found = _read_beside(path)
    if run is None:
        if found is None:
            raise WorkdirError(f"{workdir} holds no run: there is no intact {path}")
        return found
    facts = {name: value for name, value in run.items() if name != "config"}
    facts["data"] = complete_data(facts["data"])
    if found is None:
        return facts
    there = {name: found.get(name) for name in facts}
    _check_same(path, there, facts, "remove that file")
    return found


def _check_same(
    path: Path, found: dict[str, Any], wanted: dict[str, Any], what: str
) -> None:
    lines = differences(flatten(found), flatten(wanted))
    if lines:
        raise WorkdirError(
            f"{path} holds another run:\n"
            + "\n".join(lines)
            + f"\nUse a new --workdir, or {what} to resume that run."
        )


def load(
    workdir: Path, base: ml_collections.ConfigDict, run: dict[str, Any]
) -> ml_collections.ConfigDict:
    """Reads the configuration of an existing run.

    Args:
      workdir: the run's directory; its config.json has the settings that may change. If
        it is missing, their defaults are used.
      base: a configuration with every key, for their types.
      run: what the checkpoint was trained on, see `trained_on`.

    Raises:
      WorkdirError: another format version, unknown keys, or a config.json that is not
        of the checkpoint's run.
    """
    path, known = workdir / CONFIG, flatten(base.to_dict())
    load_exported(workdir / CHECKPOINTS, base, run)
    if (found := _read_beside(path)) is None:
        return base
    flat = flatten(complete(found))
    changeable = {name: flat.pop(name) for name in _MAY_CHANGE if name in flat}
    trained = flatten(complete(run["config"]))
    _check_same(path, flat, trained, "remove that file")
    for name, value in changeable.items():
        if type(value) is not type(known[name]):
            raise WorkdirError(
                f"{path} is damaged: {name} is {value!r}, expected a value such as "
                f"{known[name]!r}; fix it, or remove that file"
            )
    base.update_from_flattened_dict(changeable)
    return base


def load_exported(
    path: Path, base: ml_collections.ConfigDict, run: dict[str, Any]
) -> ml_collections.ConfigDict:
    """Reads the configuration of a run from what it was trained on alone.

    Args:
      path: of the file or folder that has it, for messages.
      base, run: see `load`; settings that may change keep their defaults.

    Raises:
      WorkdirError: another format version, or unknown keys.
    """
    _check_version(path, run["config"], base.format_version)
    known, trained = flatten(base.to_dict()), complete(run["config"])
    unknown = sorted(flatten(trained).keys() ^ (known.keys() - _MAY_CHANGE))
    if unknown:
        raise WorkdirError(f"{path}: unknown or missing keys {unknown}")
    base.update(trained)
    return base


def _read_beside(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file of the directory; None, and a warning, if that fails."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        if path.name == MANIFEST and not (
            isinstance(found.get("data"), dict)
            and isinstance(found.get("resumed"), list)
        ):
            raise ValueError("no data or no list of resumed parts")
        if path.name == MANIFEST:
            found["data"] = complete_data(found["data"])
    except FileNotFoundError:
        _LOG.warning("%s is missing; checkpoints say what they were trained on", path)
    except (ValueError, RecursionError) as error:
        _LOG.warning(
            "%s is damaged (%s); checkpoints say what they were trained on", path, error
        )
    else:
        return found
    return None


def _check_version(path: Path, found: dict[str, Any], version: int) -> None:
    there = found.get("format_version")
    if there != version:
        raise WorkdirError(
            f"{path} has format_version {there}, this program "
            f"reads {version}; use the release that wrote it, or a new --workdir"
        )
