r"""Measures speed; one JSON object a line on stdout.

python -m launch.bench --what=step [--method=unimatch] [--mpmc=recommended] \
    [--backbone=resnet50] [--crop=321] [--batch_size=2] [--dtype=float32] [--steps=5]
python -m launch.bench --what=mpmc ...    pooling, targets and weights beside the step
python -m launch.bench --what=data --dataset=camvid --data_dir=data
python -m launch.bench --what=eval --dataset=camvid --data_dir=data

Figures of one invocation were measured in one run and may be compared as ratios;
those of different machines or runs may not.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import ml_collections

from configs import base, presets
from launch import cli
from launch.bench_step import bench_mpmc, bench_step
from launch.runs import base_for, make_evaluator
from mpmc_jax.data.build import build_eval, build_train, dataset_info
from mpmc_jax.models.build import init_variables
from mpmc_jax.training import report
from mpmc_jax.training.build import build_setup
from mpmc_jax.types import Crops


def configuration(args: argparse.Namespace) -> ml_collections.ConfigDict:
    """The default configuration with the command line's settings."""
    config = base.get_base()
    config.data.name = args.dataset
    config.data.data_dir = args.data_dir
    config.data.crop = args.crop
    config.model.dtype = args.dtype
    config.train.batch_size = args.batch_size
    config.train.group_size = args.group_size
    config.train.parallel = args.parallel
    config.train.devices = args.devices
    argument = f"method={args.method},mpmc={args.mpmc},backbone={args.backbone}"
    return presets.apply(config, argument)


def bench_data(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Crops a second and core that the pipeline makes."""
    facts = dataset_info(config).facts
    _, method = base_for(config, facts)
    pipeline = build_train(config, method.streams)
    iterator = pipeline.iterator()
    try:
        next(iterator)
        begin, busy = time.perf_counter(), time.process_time()
        made = 0
        for _ in range(20 * repeats):
            batch = next(iterator)
            made += sum(
                part.image.shape[0]
                for part in jax.tree.leaves(
                    batch, is_leaf=lambda x: isinstance(x, Crops)
                )
            )
        wall, busy = time.perf_counter() - begin, time.process_time() - busy
    finally:
        iterator.close()
    return {
        "images_per_second": made / wall,
        "images_per_core_second": made / busy,
        "threads": config.data.threads,
    }


def bench_eval(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Validation images a second, compilation apart."""
    facts = dataset_info(config).facts
    model, method = base_for(config, facts)
    setup = build_setup(config, model, method, steps_per_epoch=1)
    module = setup.step.modules[method.networks[0]]
    evaluator = make_evaluator(config, module, facts.num_classes)
    variables = init_variables(jax.random.key(0), model)
    source = build_eval(config, "val")
    first = evaluator.run(variables, source)
    times = [evaluator.run(variables, source).seconds for _ in range(repeats)]
    return {
        "images_per_second": first.num_images / statistics.median(times),
        "first_pass_seconds": first.seconds,
        "programs": first.programs,
    }


BENCHES = {
    "step": bench_step,
    "mpmc": bench_mpmc,
    "data": bench_data,
    "eval": bench_eval,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("bench", __doc__)
    parser.add_argument("--what", choices=sorted(BENCHES), default="step")
    parser.add_argument("--method", default="unimatch")
    parser.add_argument("--mpmc", default="recommended")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parallel", default="pmap")
    parser.add_argument("--devices", type=int, default=1, help="0 for all")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--steps", type=int, default=5, help="timed repetitions")
    args = parser.parse_args(arguments)
    with cli.user_errors():
        config = configuration(args)
        figures = BENCHES[args.what](config, args.steps)
    manifest = report.manifest(config.seed, {"dataset": args.dataset})
    print(json.dumps({**vars(args), **figures, "manifest": manifest}))


if __name__ == "__main__":
    main()
