"""Compares the steps of every method on a tiny transformer, which takes half an hour.

python -m tests.support.transformer_matrix --output=results/transformer_matrix

Each of the methods, with and without MPMC, takes two steps on DPT: in float64 on one
device, on four by pmap and on four by shard_map; in float32, whose program compiles
once and goes on from a checkpoint; and one in bfloat16. Adds to results.jsonl what is
missing there, writes table.md, and ends with an error that names the rows that miss a
bound.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile

import tests.conftest  # noqa: F401  Sets the devices and the strict JAX of all tests.

# isort: split
import jax
import numpy as np

from configs import presets
from mpmc_jax.text import markdown_table
from mpmc_jax.training.manifest import make_manifest
from tests.support import tiny, x64
from tests.training.test_parity import resume, transformer_settings

MOST = {"pmap": 1e-10, "shard_map": 1e-10, "bfloat16": 0.05, "resumed": 0.0}
COLUMNS = ("method", "mpmc", *MOST, "compilations")


def mappings(method: str, mpmc: str) -> dict[str, float]:
    """Largest difference of states and values after two steps in float64."""
    changes = transformer_settings(method, mpmc=mpmc, kinds=("pmap", "shard_map"))
    found = x64.call_x64(
        "tests.training.test_parity", f"mapping_difference({method!r}, **{changes!r})"
    )
    # `max` would leave out a NaN.
    return {
        kind: float(np.max([found[f"{kind} state"], found[f"{kind} values"]]))
        for kind in ("pmap", "shard_map")
    }


def precisions(method: str, mpmc: str) -> dict[str, float]:
    """The loss in bfloat16 against float32, a resumed step, and compilations."""
    with tempfile.TemporaryDirectory() as folder:
        low, full = (
            resume(method, mpmc, dtype, pathlib.Path(folder, dtype))
            for dtype in ("bfloat16", "float32")
        )
    return {
        "bfloat16": abs(low.loss / full.loss - 1),
        "resumed": tiny.difference(full.resumed, full.undisturbed),
        "compilations": 1 + full.compiled,
    }


def missed(row: dict) -> list[str]:
    """The bounds that a row does not keep."""
    wrong = [name for name, most in MOST.items() if not row[name] <= most]
    wrong += ["compilations"] * (row["compilations"] != 1)
    return [f"{row['method']}, mpmc={row['mpmc']}: {name}" for name in wrong]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("transformer_matrix", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.jsonl"
    rows = (
        [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )
    done = {(row["method"], row["mpmc"]) for row in rows}
    for pair in itertools.product(presets.METHODS, ("off", "recommended")):
        if pair in done:
            continue
        row = dict(zip(("method", "mpmc"), pair, strict=True))
        row |= mappings(*pair) | precisions(*pair)
        row["manifest"] = make_manifest(0, {"dataset": "random arrays"})
        rows.append(row)
        jax.clear_caches()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(row["method"], row["mpmc"], [row[name] for name in MOST], flush=True)
    cells = [
        [f"{row[n]:.1g}" if n in MOST else str(row[n]) for n in COLUMNS] for row in rows
    ]
    (output / "table.md").write_text(markdown_table(COLUMNS, cells) + "\n")
    if wrong := [text for row in rows for text in missed(row)]:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
