"""A run's directory: its configuration and what may not change under it."""

import json
from pathlib import Path
from typing import Any

import ml_collections

CONFIG = "config.json"


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


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, or checks that the one there says the same.

    Raises:
      WorkdirError: another configuration or format version; lists the differences.
    """
    path = workdir / CONFIG
    wanted = json.loads(json.dumps(config.to_dict()))
    if not path.exists():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            raise WorkdirError(
                f"cannot write to --workdir={workdir}: {error.strerror}; choose "
                "another or mend its permissions"
            ) from error
        return
    found = _read(path)
    _check_version(path, found, wanted["format_version"])
    old, new = flatten(found), flatten(wanted)
    differences = [
        f"  {name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, None) != new.get(name, None)
    ]
    if differences:
        raise WorkdirError(
            f"{path} holds another run:\n"
            + "\n".join(differences)
            + "\nUse a new --workdir, or the same settings to go on with that run."
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
        return json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); restore it or use a new --workdir"
        ) from error


def _check_version(path: Path, found: dict[str, Any], version: int) -> None:
    if found["format_version"] != version:
        raise WorkdirError(
            f"{path} has format_version {found['format_version']}, this program "
            f"reads {version}; use the release that wrote it, or a new --workdir"
        )
