r"""Trains every method with and without MPMC for a few steps on one fixed batch.

python -m launch.bench.smoke_matrix --data_dir=data --output=results/combinations

ResNet-18, crop 129, 2 + 2 images (4 + 4 for AEL) that stay the same for 30 steps,
float32: the mean of the last 5 supervised losses must be at most 0.7 of the first, and
every phase compile once; a step moves nothing between host and device. Then 3 steps in
bfloat16 from step 24 on (within 5 % of float32), and 3 of 8 + 8 images on 4 devices.
Writes table.md and results.jsonl, a line a combination; those of this revision are not
made again. Ends with an error that names the combinations that miss a bound.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base, presets
from launch import cli
from mpmc_jax.atomic_write import to_json, write_text
from mpmc_jax.data.build import build_train
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.build import Setup, build_parallel, build_setup, init_state
from mpmc_jax.paths import as_path
from mpmc_jax.text import markdown_table
from mpmc_jax.training.compiled_steps import Programs
from mpmc_jax.training.manifest import git_revision, make_manifest
from mpmc_jax.training.state import TrainState, to_host
from mpmc_jax.training.train_step import make_step_info
from mpmc_jax.types import Batch

STEPS, STEPS_PER_EPOCH, CHECKED, FROM = 30, 5, 3, 24
DEVICES = 4
MOST_RATIO, MOST_DIFFERENCE = 0.7, 0.05
MPMC = ("off", "recommended")
COLUMNS = (
    "method",
    "mpmc",
    "first",
    "last",
    "ratio",
    "phases",
    "compiles",
    "bfloat16",
    "devices",
    "seconds",
)


def batch_size(method: str) -> int:
    """Labeled images a step; AEL normalizes a mixture of half of them alone."""
    return 4 if method == "ael" else 2


def configuration(
    method: str, mpmc: str, data_dir: str, **changes: Any
) -> ml_collections.ConfigDict:
    """What a combination trains; `changes` are dotted keys with "__" for the dot."""
    config = base.get_base()
    config.data.name = "camvid"
    config.data.data_dir = data_dir
    config.data.split = "1_8"
    config.data.crop = 129
    config.optimizer.lr = 1e-2
    config.optimizer.head_multiplier = 1.0
    config.train.steps = STEPS
    config.train.batch_size = batch_size(method)
    config.train.group_size = 2
    config.train.devices = 1
    presets.apply(config, f"method={method},mpmc={mpmc},backbone=resnet18")
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def setup_of(config: ml_collections.ConfigDict) -> Setup:
    """The parts of a run on the prepared data set, with epochs of 5 steps."""
    _, model, method = runs.open_model_and_method(config)
    return build_setup(config, model, method, steps_per_epoch=STEPS_PER_EPOCH)


def first_batch(config: ml_collections.ConfigDict, setup: Setup) -> Batch:
    """The batch that is trained on again and again."""
    iterator = build_train(config, setup.step.method.streams).iterator()
    try:
        groups = config.train.batch_size // config.train.group_size
        iterator.request(0, np.arange(groups))
        return next(iterator)
    finally:
        iterator.close()


def steps_on(
    config: ml_collections.ConfigDict,
    setup: Setup,
    batch: Batch,
    state: TrainState,
    count: int,
) -> tuple[list[dict[str, float]], int, dict[int, TrainState]]:
    """`count` steps on one batch, under a guard against transfers.

    Returns:
      The numbers of every step, how often the step was compiled, and the state before
      step `FROM`, if it was reached.

    Raises:
      RuntimeError: a step was skipped.
    """
    parallel = build_parallel(config)
    programs = Programs(parallel, setup.step)
    start = int(state.step)
    on_device, placed = parallel.replicate(to_host(state)), parallel.place(batch)
    orders = [
        parallel.replicate(make_step_info(i)) for i in range(start, start + count)
    ]
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        compiled.append(event)

    values, kept = [], {}
    for number in range(start, start + count):
        if number == FROM:
            kept[number] = to_host(parallel.fetch(on_device))
        step = programs.get(number)
        jax.monitoring.register_event_duration_secs_listener(listen)
        with jax.transfer_guard("disallow"):
            on_device, metrics = step(on_device, placed, orders[number - start])
        jax.monitoring.unregister_event_duration_listener(listen)
        read = parallel.start_reading(metrics)()
        if read.skipped:
            raise RuntimeError(f"step {number} was skipped at {read.failed_check}")
        values.append({k: float(v) for k, v in read.values.items()})
    compiles = sum("backend_compile" in name for name in compiled)
    return values, compiles, kept


def supervised_losses(values: Sequence[dict[str, float]]) -> list[float]:
    """The supervised loss of every step, the mean of all networks'."""
    found = []
    for value in values:
        terms = [v for name, v in value.items() if name.startswith("loss_supervised")]
        found.append(float(np.mean(terms)))
    return found


def combination(method: str, mpmc: str, data_dir: str) -> dict[str, Any]:
    """Runs one method with one plug-in; the figures of `COLUMNS`."""
    begin = time.monotonic()
    config = configuration(method, mpmc, data_dir)
    setup = setup_of(config)
    batch = first_batch(config, setup)
    state = init_state(setup, config.seed)
    values, compiles, kept = steps_on(config, setup, batch, state, STEPS)
    supervised = supervised_losses(values)

    half = configuration(method, mpmc, data_dir, model__dtype="bfloat16")
    low, *_ = steps_on(half, setup_of(half), batch, kept[FROM], CHECKED)
    pairs = zip(low, values[FROM : FROM + CHECKED], strict=True)
    error = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)

    wide = configuration(
        method,
        mpmc,
        data_dir,
        train__batch_size=2 * DEVICES,
        train__devices=DEVICES,
        u2pl__warmup_epochs=0,
    )
    parts = setup_of(wide)
    several, *_ = steps_on(
        wide, parts, first_batch(wide, parts), init_state(parts, wide.seed), CHECKED
    )
    epochs = range(STEPS // STEPS_PER_EPOCH)
    return {
        "method": method,
        "mpmc": mpmc,
        "first": supervised[0],
        "last": float(np.mean(supervised[-5:])),
        "ratio": float(np.mean(supervised[-5:])) / supervised[0],
        "phases": len({setup.step.method.phase(epoch) for epoch in epochs}),
        "compiles": compiles,
        "bfloat16": error,
        "devices": several[-1]["loss"],
        "seconds": time.monotonic() - begin,
        "losses": supervised,
        "manifest": make_manifest(config.seed, {"dataset": "camvid"}),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as Markdown."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [[shown(line[name]) for name in COLUMNS] for line in lines]
    return markdown_table(COLUMNS, rows) + "\n"


def missed(line: dict[str, Any]) -> list[str]:
    """The bounds that a combination does not keep."""
    name = f"{line['method']}, mpmc={line['mpmc']}:"
    found = []
    if not line["ratio"] <= MOST_RATIO:
        found.append(f"{name} loss falls to {line['ratio']:.3g}, not {MOST_RATIO}")
    if line["compiles"] != line["phases"]:
        found.append(
            f"{name} {line['compiles']} compilations of {line['phases']} phases"
        )
    if not line["bfloat16"] <= MOST_DIFFERENCE:
        found.append(f"{name} bfloat16 differs by {line['bfloat16']:.3g}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("bench.smoke_matrix", __doc__)
    parser.add_argument("--data_dir", default="data", help="holds CamVid, prepared")
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--method", nargs="+", choices=presets.METHODS, default=list(presets.METHODS)
    )
    args: argparse.Namespace = parser.parse_args(arguments)
    with cli.user_errors():
        output = as_path("--output", args.output)
        data_dir = str(as_path("--data_dir", args.data_dir))
        jax.config.update("jax_num_cpu_devices", DEVICES)
        output.mkdir(parents=True, exist_ok=True)
        path = output / "results.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        now = git_revision()
        lines = [line for line in lines if line["manifest"]["revision"] == now]
        done = {(line["method"], line["mpmc"]) for line in lines}
        for method, mpmc in itertools.product(args.method, MPMC):
            if (method, mpmc) in done:
                continue
            lines.append(combination(method, mpmc, data_dir))
            # A process may map only so much memory, and programs take their share.
            jax.clear_caches()
            write_text(path, "".join(to_json(line) + "\n" for line in lines))
            print(table(lines[-1:]).splitlines()[-1], flush=True)
        write_text(output / "table.md", table(lines))
        if bounds := [text for line in lines for text in missed(line)]:
            raise ValueError("; ".join(bounds))


if __name__ == "__main__":
    main()
