r"""Measures speed; one JSON object a line on stdout.

python -m launch.bench --what=step [--method=unimatch] [--mpmc=recommended] \
    [--backbone=resnet50] [--crop=321] [--batch_size=2] [--dtype=float32] [--steps=5] \
    [--profile=DIR] [--peer=torch,torch_best]
python -m launch.bench --what=methods ...  every method's step in turns, as ratios
python -m launch.bench --what=mpmc ...    pooling, targets and weights beside the step
python -m launch.bench --what=data --dataset=camvid --data_dir=data
python -m launch.bench --what=eval [--images=200 --sizes=40 --largest=500]
python -m launch.bench --what=eval --images=0 --dataset=camvid --data_dir=data

Figures of one invocation were measured in one run and may be compared as ratios;
those of different machines or runs may not.
"""

import argparse
import json
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base, presets
from launch import cli
from launch.bench_eval import bench_eval
from launch.bench_methods import bench_methods
from launch.bench_peer import bench_peers
from launch.bench_step import bench_mpmc, bench_step
from launch.runs import open_base
from mpmc_jax.data.build import build_train
from mpmc_jax.training import report
from mpmc_jax.types import Crops


def configuration(args: argparse.Namespace, method: str) -> ml_collections.ConfigDict:
    """The default configuration with the command line's settings."""
    config = base.get_base()
    config.data.name = args.dataset
    argument = f"method={method},mpmc={args.mpmc},backbone={args.backbone}"
    presets.apply(config, argument)
    config.data.data_dir = args.data_dir
    config.data.crop = args.crop
    config.model.dtype = args.dtype
    config.train.batch_size = args.batch_size
    config.train.group_size = args.group_size
    config.train.parallel = args.parallel
    config.train.devices = args.devices
    config.eval.batch_size = args.eval_batch_size
    config.eval.pad_to = 0
    return config


def bench_data(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Crops a second and core that the pipeline makes."""
    _, _, method = open_base(config)
    pipeline = build_train(config, method.streams)
    iterator = pipeline.iterator()
    rng = np.random.default_rng(0)
    groups = config.train.batch_size // config.train.group_size

    def request(step: int) -> None:
        """As the device would: any images."""
        if method.delay:
            iterator.request(step, rng.integers(0, pipeline.num_unlabeled, groups))

    try:
        for step in range(method.delay + 1):
            request(step)
        next(iterator)
        begin, busy = time.perf_counter(), time.process_time()
        made = 0
        for step in range(1, 20 * repeats + 1):
            request(step + method.delay)
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


BENCHES = {
    "mpmc": bench_mpmc,
    "data": bench_data,
}


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench", __doc__)
    parser.add_argument(
        "--what", choices=sorted([*BENCHES, "step", "methods", "eval"]), default="step"
    )
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
    parser.add_argument("--images", type=int, default=200, help="of eval; 0: val's")
    parser.add_argument("--sizes", type=int, default=40, help="distinct, of eval")
    parser.add_argument("--largest", type=int, default=500, help="side, of eval")
    parser.add_argument("--eval_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed repetitions")
    parser.add_argument("--profile", default="", metavar="DIR", help="trace of a step")
    parser.add_argument(
        "--peer",
        default="",
        metavar="NAMES",
        help="torch, torch_best: PyTorch's step in turns with ours",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    args = _parser().parse_args(arguments)
    with cli.user_errors():
        if args.what == "methods":
            configs = {name: configuration(args, name) for name in presets.METHODS}
            found = bench_methods(configs, args.steps)
        elif args.what == "eval":
            config = configuration(args, args.method)
            names = ("images", "sizes", "largest")
            settings = {name: getattr(args, name) for name in names}
            found = {args.method: bench_eval(config, args.steps, **settings)}
        elif args.what == "step":
            config = configuration(args, args.method)
            if args.peer:
                figures = bench_peers(config, args.steps, args.peer.split(","))
            else:
                figures = bench_step(config, args.steps, args.profile)
            found = {args.method: figures}
        else:
            config = configuration(args, args.method)
            found = {args.method: BENCHES[args.what](config, args.steps)}
    made_up = args.what == "eval" and args.images
    data = {"dataset": "made-up" if made_up else args.dataset}
    manifest = report.manifest(base.get_base().seed, data)
    for name, figures in found.items():
        line = {**vars(args), "method": name, **figures, "manifest": manifest}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
