"""A run's directory: its configuration and what may not change under it."""

import json
import logging
from pathlib import Path
from typing import Any

import ml_collections

from mpmc_jax.atomic_write import write_json
from mpmc_jax.training.integrity import differences

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"

# What may change between the parts of a run: it decides how, not what.
_CIRCUMSTANCES = (
    "data.data_dir",
    "data.resident",
    "data.threads",
    "data.prefetch",
    "train.devices",
    "train.parallel",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "eval.batch_size",
)


class WorkdirError(RuntimeError):
    """The directory belongs to another run; the message shows the difference."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def has_steps(workdir: Path) -> bool:
    """Whether a run saved anything there; one that did not may be replaced."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(
        each.name.isdigit() or each.name.startswith("damaged-")
        for each in folder.iterdir()
    )


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json; where a run has saved steps, checks that it is this one.

    How a run is done may change: devices, threads, rhythms, where the data lie.

    Raises:
      WorkdirError: another configuration or format version; lists the differences.
    """
    path = workdir / CONFIG
    wanted = json.loads(json.dumps(config.to_dict()))
    if path.exists() and has_steps(workdir):
        found = _read(path)
        _check_version(path, found, wanted["format_version"])
        there, now = flatten(found), flatten(wanted)
        for name in _CIRCUMSTANCES:
            before, after = there.pop(name, None), now.pop(name, None)
            if before != after:
                _LOG.info("%s is %r from here on, not %r", name, after, before)
        _check_same(path, there, now, "the same settings")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except OSError as error:
        reason = "it is a file" if workdir.is_file() else error.strerror
        raise WorkdirError(
            f"cannot write to --workdir={workdir}: {reason}; choose "
            "another or mend its permissions"
        ) from error


def record(workdir: Path, facts: dict[str, Any], circumstances: dict[str, Any]) -> None:
    """Writes manifest.json; where a run has saved, checks it and adds to "resumed".

    Args:
      workdir: the run's directory.
      facts: what may not change between the parts of a run, such as its data.
      circumstances: what may: versions, devices, revision.

    Raises:
      WorkdirError: the facts differ; lists the differences.
    """
    path = workdir / MANIFEST
    if not path.exists() or not has_steps(workdir):
        write_json(path, {**circumstances, **facts, "resumed": []})
        return
    found = _read(path)
    there = {name: found.get(name) for name in facts}
    _check_same(path, there, json.loads(json.dumps(facts)), "the same data")
    changed = {k: v for k, v in circumstances.items() if k not in facts}
    found["resumed"] = [*found.get("resumed", []), changed]
    write_json(path, found)


def read_manifest(workdir: Path) -> dict[str, Any]:
    """What `record` wrote.

    Raises:
      WorkdirError: there is none, or it is damaged.
    """
    path = workdir / MANIFEST
    if not path.exists():
        raise WorkdirError(f"{workdir} holds no run: there is no {MANIFEST} in it")
    return _read(path)


def _check_same(
    path: Path, found: dict[str, Any], wanted: dict[str, Any], what: str
) -> None:
    lines = differences(flatten(found), flatten(wanted))
    if lines:
        raise WorkdirError(
            f"{path} holds another run:\n"
            + "\n".join(lines)
            + f"\nUse a new --workdir, or {what} to go on with that run."
        )


def load(workdir: Path, base: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration of an existing run.

    Args:
      workdir: the run's directory.
      base: a configuration with every key, which gives the types.

    Raises:
      WorkdirError: no run there, another format version, or unknown keys.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise WorkdirError(f"{workdir} holds no run: there is no {CONFIG} in it")
    found = _read(path)
    _check_version(path, found, base.format_version)
    unknown = sorted(flatten(found).keys() ^ flatten(base.to_dict()).keys())
    if unknown:
        raise WorkdirError(f"{path}: unknown or missing keys {unknown}")
    base.update(found)
    return base


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); restore it or use a new --workdir"
        ) from error
    if not isinstance(found, dict):
        raise WorkdirError(f"{path} is damaged: no JSON object; use a new --workdir")
    return found


def _check_version(path: Path, found: dict[str, Any], version: int) -> None:
    there = found.get("format_version")
    if there != version:
        raise WorkdirError(
            f"{path} has format_version {there}, this program "
            f"reads {version}; use the release that wrote it, or a new --workdir"
        )
