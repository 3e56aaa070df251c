"""Compares the steps of every method on a tiny transformer, which takes half an hour.

python -m tests.support.transformer_matrix --output=results/transformer_matrix

Each of the methods, with and without MPMC, takes two steps on DPT: in float64 on one
device, on four by pmap and on four by shard_map; in float32, whose program compiles
once and goes on from a checkpoint; and one in bfloat16. Adds to results.jsonl what is
missing there, writes table.md, and ends with an error that names the rows that miss a
bound.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import tempfile

import tests.conftest  # noqa: F401  Sets the devices and the strict JAX of all tests.

# isort: split
import chex
import jax
import numpy as np

from configs import presets
from launch.bench.timing import COMPILED, counted
from mpmc_jax.experiments.build import state_shape
from mpmc_jax.text import markdown_table
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.manifest import make_manifest
from mpmc_jax.training.state import to_host
from tests.support import tiny, x64
from tests.training.test_parity import transformer_settings

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
    losses = {}
    for dtype in ("bfloat16", "float32"):
        chex.clear_trace_counter()
        cfg = tiny.config(
            f"method={method},mpmc={mpmc}",
            **transformer_settings(method, model__dtype=dtype),
        )
        parts = tiny.setup(cfg)
        start = to_host(tiny.init_state(parts, cfg.seed))
        once = functools.partial(chex.assert_max_traces, n=1)
        advance = tiny.stepper(cfg, trace=once)
        first, (metrics,) = advance(start, 1)
        losses[dtype] = float(metrics.values["loss"])
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpointer(pathlib.Path(folder)) as checkpointer,
    ):
        checkpointer.save(first, {}, wait=True)
        restored = checkpointer.restore_latest(state_shape(parts))
    with counted() as counts:
        halves, _ = advance(restored.state, 1)
    whole, _ = advance(start, 2)
    return {
        "bfloat16": abs(losses["bfloat16"] / losses["float32"] - 1),
        "resumed": tiny.difference(halves, whole),
        "compilations": 1 + counts[COMPILED],
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
