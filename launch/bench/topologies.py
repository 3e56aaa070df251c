"""Every published method's step, compiled for Cloud TPUs that are not there.

python -m launch.bench.topologies [--results=results/bench/tpu_compile.jsonl]

One JSON line of `launch.bench --what=compile` a program, appended as soon as it is
there; programs that the file has are left out, so that an interrupted run goes on. A
program takes 10 to 75 minutes on two cores and 5 to 13 GB of memory. libtpu must be
installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from launch import cli
from mpmc_jax.atomic_write import write_text
from mpmc_jax.paths import as_path

RESULTS = "results/bench/tpu_compile.jsonl"


class Program(NamedTuple):
    """A step of ResNet-101 with MPMC at crop 801 in bfloat16."""

    topology: str
    method: str
    # Images of a chip, labeled and as many unlabeled ones; of a group, as many.
    each: int
    group_size: int
    remat: str = "off"

    def settings(self) -> dict[str, Any]:
        """The bench's arguments."""
        rows, columns = map(int, self.topology.partition(":")[2].split("x"))
        return {
            "what": "compile",
            "method": self.method,
            "mpmc": "recommended",
            "backbone": "resnet101",
            "crop": 801,
            "dtype": "bfloat16",
            "topology": self.topology,
            "batch_size": rows * columns * self.each,
            "group_size": self.group_size,
            "remat": self.remat,
        }


# Methods that mix the images of a group need two of them.
METHODS = [
    Program("v5e:4x4", "unimatch", 1, 1),
    Program("v5e:4x4", "mean_teacher", 2, 2),
    Program("v5e:4x4", "ael", 2, 2),
    Program("v5e:4x4", "u2pl", 2, 2),
    Program("v5e:4x4", "augseg", 2, 2),
]
# Where the search for UniMatch's largest batch begins: topology, remat, images a chip.
SEARCHES = [
    ("v5e:2x4", "off", 2),
    ("v5e:2x4", "all", 4),
    ("v6e:4x4", "off", 5),
    ("v6e:4x4", "all", 8),
]
MOST_PROGRAMS = 3

_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def _known(results: Path, program: Program) -> dict[str, Any] | None:
    lines = results.read_text().splitlines() if results.exists() else []
    for line in map(json.loads, lines):
        if program.settings().items() <= line.items():
            return line
    return None


def compile_once(results: Path, program: Program) -> dict[str, Any]:
    """The program's line, of the file or of a process that is now run and recorded.

    Raises:
      ValueError: the process failed; its own message is on stderr.
    """
    line = _known(results, program)
    if line is None:
        settings = program.settings()
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        # A process of its own: what a compilation took is given back.
        run = subprocess.run(
            [sys.executable, "-m", "launch.bench", *arguments],
            env=_ENVIRONMENT | os.environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        if run.returncode:
            raise ValueError(f"{program} was not compiled; what is done is kept")
        before = results.read_text() if results.exists() else ""
        write_text(results, before + run.stdout)
        line = json.loads(run.stdout)
    print(f"{program}: {line.get('refused', 'fits')}", flush=True)
    return line


def search(results: Path, topology: str, remat: str, begin: int) -> None:
    """Compiles UniMatch at batches from `begin` on until the largest is known."""
    tried: dict[int, bool] = {}
    each = begin
    while each > 0 and each not in tried and len(tried) < MOST_PROGRAMS:
        program = Program(topology, "unimatch", each, 1, remat)
        tried[each] = "refused" not in compile_once(results, program)
        each += 1 if tried[each] else -1


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("bench.topologies", __doc__)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args(arguments)
    with cli.user_errors():
        results = as_path("--results", args.results)
        for program in METHODS:
            compile_once(results, program)
        for topology, remat, begin in SEARCHES:
            search(results, topology, remat, begin)


if __name__ == "__main__":
    main()
