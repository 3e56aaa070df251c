r"""Trains a run, or resumes it.

python -m launch.train --config=configs/camvid.py:method=unimatch,mpmc=recommended \
    --workdir=runs/camvid [--config.train.steps=1000]
python -m launch.train --fit --config=... [--config.a.b=VALUE]   trains nothing, says
    which batch, accumulation and rematerialization fit here, and for how many hours

The same command again resumes from the newest intact checkpoint.
"""

import re
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from launch import cli, multihost
from launch.fit import fit
from mpmc_jax.experiments import config_checks
from mpmc_jax.experiments.train import train
from mpmc_jax.text import did_you_mean
from mpmc_jax.training import metric_writer

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "configs/DATASET.py[:KEY=VALUE,...] with the keys method, mpmc, split, lists, "
    "crop, backbone and model (docs/training.md); --config.a.b=VALUE sets what "
    "mpmc_jax/experiments/base_config.py declares.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run; one that holds a run resumes it."
)
_FIT = flags.DEFINE_bool(
    "fit", False, "Print what fits these devices, and the hours; train nothing."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, discovered by JAX (TPU pods)."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Of several processes set explicitly: HOST:PORT of process 0."
)
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", -1, "Index of this process.")


# Instead of Python's own words for a mistyped value.
_TRUTH = "True or False is needed, not"
_WHOLE, _NUMBER = "a whole number is needed, not", "a number is needed, not"


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does; a mistake ends with one line, and --help with 0."""
    if "--help" in argv:
        app.usage(shorthelp=True, exitcode=0)
    try:
        config_checks.check_keys(argv)
        rest = flags.FLAGS(argv)[1:]
        needed = (_CONFIG,) if _FIT.value else (_CONFIG, _WORKDIR)
        missing = [flag.name for flag in needed if flag.value in (None, "")]
        if not missing:
            # Fails if the file could not be read.
            config_checks.check_epochs(argv, _CONFIG.value)
    except (flags.Error, ValueError, OSError, AttributeError) as error:
        # ml_collections wraps what a configuration file raised; its reason is last.
        reason = str(error).strip().splitlines()[-1].strip()
        reason = reason.removeprefix("ValueError: ").removeprefix("[Errno 2] ")
        reason = reason.replace("invalid literal for int() with base 10:", _WHOLE)
        reason = reason.replace("could not convert string to float:", _NUMBER)
        reason = re.sub(r"\('Non-boolean.*, ('.*')\)", rf"{_TRUTH} \1", reason)
        if isinstance(error, AttributeError):
            if "get_config" not in reason:
                raise  # a mistake within the file: its traceback is needed
            reason = "--config names a file without get_config"
        not_found = "No such file" in reason or "get_config" in reason
        sys.exit(f"error: {reason}{_name_files(argv) if not_found else ''}")
    if missing:
        sys.exit(f"error: --{missing[0]} is needed; --help says more")
    if rest:
        sys.exit(f"error: unexpected arguments {rest}; options are --name=value")
    return argv[:1]


def _name_files(argv: list[str]) -> str:
    """Names the configuration files, and the one closest to the one that is given."""
    shared = ("__init__", "base", "presets")
    given = [each for each in argv if each.startswith("--config=")]
    path = Path(given[-1].removeprefix("--config=").partition(":")[0] if given else "")

    def in_folder(folder: Path) -> list[str]:
        files = sorted(set(folder.glob("*.py")) - {path})
        return [str(each) for each in files if each.stem not in shared]

    near = "" if path.exists() else did_you_mean(str(path), in_folder(path.parent))
    return f"; {near}there are {in_folder(Path('configs'))}"


def main(argv: list[str]) -> None:
    """Entry point; user errors end with one line and status 1."""
    del argv  # `parse_flags` has read it.
    absl_logging.set_verbosity(absl_logging.WARNING)
    metric_writer.setup_logging()
    cli.setup_runtime()
    with multihost.exit_on_failure(), cli.user_errors():
        multihost.join(
            discover=_DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            count=_PROCESSES.value,
            index=_PROCESS.value,
        )
        if _FIT.value:
            fit(_CONFIG.value)
        else:
            train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
