r"""Measures speed; one JSON object a line on stdout.

python -m launch.bench --what=step [--method=unimatch] [--mpmc=recommended] \
    [--backbone=resnet50] [--crop=321] [--batch_size=2] [--dtype=float32] [--steps=5] \
    [--profile=DIR] [--peer=torch,torch_best]
python -m launch.bench --what=methods ...  every method's step in turns, as ratios
python -m launch.bench --what=mpmc ...    pooling, targets and weights beside the step
python -m launch.bench --what=scaling ...  batches and crops, or --devices=8
python -m launch.bench --what=fits ...    memory at growing batches, compiled only
python -m launch.bench --what=compile [--topology=v5e:4x4] ...  not run; for a TPU
python -m launch.bench --what=compile --topology=h100:1 [--top=20] [--fits] \
    [--against=FILE] [--peer=torch] ...   counted kernel by kernel, for NVIDIA GPUs
python -m launch.bench --what=gpu [--shrink]   what to run and send back from a GPU
python -m launch.bench --what=data [--images=200 --largest=500]    or 2048
python -m launch.bench --what=data --images=0 --dataset=camvid --data_dir=data
python -m launch.bench --what=eval [--images=200 --sizes=40 --largest=500] \
    [--peer=torch]
python -m launch.bench --what=eval --images=0 --dataset=camvid --data_dir=data

An argument that does not act on what is measured is refused. Figures of one invocation
were measured in one run and may be compared as ratios; those of different machines or
runs may not.
"""

import argparse
import functools
import sys
from collections.abc import Collection
from typing import Any

import ml_collections

from configs import base, presets
from launch import cli
from launch.bench.compile import bench_compile
from launch.bench.data import bench_made_up, bench_prepared
from launch.bench.eval import MadeUp, bench_eval
from launch.bench.gpu.check import bench_gpu
from launch.bench.gpu.devices import RATES, parse_topology
from launch.bench.gpu.program import bench_gpu_program, ratios, read_program
from launch.bench.gpu.roofline import figures, table
from launch.bench.memory import bench_fits
from launch.bench.methods import bench_methods
from launch.bench.mpmc import bench_mpmc
from launch.bench.pytorch.run import bench_peers, check_peers, count_peer
from launch.bench.scaling import bench_scaling
from launch.bench.step import bench_step
from mpmc_jax.atomic_write import to_json
from mpmc_jax.evaluation.protocols import PROTOCOLS
from mpmc_jax.models.rematerialization import REMATS
from mpmc_jax.paths import as_path
from mpmc_jax.training.manifest import make_manifest

# A step's program, and its run.
_NETWORK = frozenset(("backbone", "crop", "group_size", "dtype", "remat", "attention"))
_PROGRAM = _NETWORK | {"method", "mpmc", "model", "dataset"}
_STEP = _PROGRAM | {"batch_size", "parallel", "devices", "steps"}
_PREPARED = frozenset(("images", "dataset", "data_dir", "method", "crop", "steps"))
_EVAL = frozenset(
    ("images", "method", "backbone", "dtype", "eval_batch_size", "steps", "peer")
)
_COUNTED = frozenset(("top", "fits", "against", "peer"))
# By what is measured: the arguments that act on it.
ARGUMENTS = {
    "step": _STEP | {"profile", "peer"},
    "step --peer": _STEP | {"peer"},
    "methods": _STEP - {"method"},
    "mpmc": _STEP,
    "scaling": _STEP,
    "fits": _PROGRAM | {"devices", "steps"},
    "compile": _PROGRAM | {"batch_size", "devices", "topology"},
    "compile --topology": _PROGRAM | {"batch_size", "topology"},
    "compile --topology=GPU:N": _PROGRAM | {"batch_size", "topology"} | _COUNTED,
    "gpu": _NETWORK | {"batch_size", "steps", "peer", "shrink"},
    "data": frozenset(("images", "largest", "crop", "batch_size", "steps")),
    "data --images=0": _PREPARED | {"batch_size", "group_size"},
    "eval": _EVAL | {"sizes", "largest"},
    "eval --images=0": _EVAL | _PREPARED,
}
# By what is measured: defaults that are not those of the parser.
DEFAULTS = {"gpu": {"batch_size": 8, "dtype": "bfloat16", "steps": 20}}


def check_arguments(args: argparse.Namespace, given: Collection[str]) -> None:
    """Refuses arguments that do not act on what is measured.

    Args:
      args: all arguments.
      given: names of those on the command line, `what` apart.

    Raises:
      ValueError: names one, and what it is for.
    """
    if args.steps < 1:
        raise ValueError(f"--steps={args.steps}: at least 1 repetition is needed")
    kind = args.what
    if args.what in ("data", "eval") and not args.images:
        kind += " --images=0"
    elif args.what == "step" and args.peer:
        kind += " --peer"
    elif args.what == "compile" and args.topology:
        kind += " --topology=GPU:N" if parse_topology(args.topology) else " --topology"
    for name in sorted(set(given) - ARGUMENTS[kind]):
        fitting = ", ".join(what for what, names in ARGUMENTS.items() if name in names)
        raise ValueError(f"--{name} is not for --what={kind}; it is for {fitting}")


def configuration(
    args: argparse.Namespace, method: str, mpmc: str = ""
) -> ml_collections.ConfigDict:
    """The default configuration with the command line's settings.

    Args:
      args: the command line.
      method: its method, instead of that of the command line.
      mpmc: the same, if not empty.
    """
    config = base.get_base()
    config.data.name = args.dataset
    mpmc = mpmc or args.mpmc
    argument = f"method={method},mpmc={mpmc},backbone={args.backbone}"
    if args.model:
        argument += f",model={args.model}"
    presets.apply(config, argument)
    config.data.data_dir = str(as_path("--data_dir", args.data_dir))
    config.data.crop = args.crop
    config.model.dtype = args.dtype
    config.train.batch_size = args.batch_size
    config.train.group_size = args.group_size
    config.model.remat = args.remat
    config.model.attention = args.attention
    config.train.parallel = args.parallel
    config.train.devices = args.devices
    config.eval.batch_size = args.eval_batch_size
    config.eval.pad_to = 0
    return config


def _given(parser: argparse.ArgumentParser, arguments: list[str] | None) -> set[str]:
    """Names of the arguments that are on the command line."""
    defaults = vars(parser.parse_args([]))
    # The parser sets no default where there is a value, be it None.
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    found = vars(parser.parse_args(arguments, unset))
    return {name for name, value in found.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench", __doc__)
    parser.add_argument(
        "--what",
        choices=[kind for kind in ARGUMENTS if " " not in kind],
        default="step",
    )
    parser.add_argument("--method", default="unimatch")
    parser.add_argument("--mpmc", default="recommended")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--model", default="", help="decoder; empty: the backbone's")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parallel", default="pmap")
    parser.add_argument("--devices", type=int, default=1, help="0 for all")
    parser.add_argument(
        "--topology",
        default="",
        help="of compile: a TPU that is not there (libtpu), or an NVIDIA GPU (h100:1, "
        "h200:8, a100:1: name and number)",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="operations to list, of a GPU's program"
    )
    parser.add_argument(
        "--fits", action="store_true", help="its largest batch, by a second compilation"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="FILE",
        help="line of an earlier one, to compare with",
    )
    parser.add_argument("--remat", choices=REMATS, default="off", help="model.remat")
    parser.add_argument("--attention", default="xla", help="model.attention")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        help="made-up ones of data and eval; 0: the data set's",
    )
    parser.add_argument("--sizes", type=int, default=40, help="distinct ones, of eval")
    parser.add_argument("--largest", type=int, default=500, help="their longest side")
    parser.add_argument("--eval_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="repetitions at most")
    parser.add_argument("--profile", default="", metavar="DIR", help="trace of a step")
    parser.add_argument(
        "--peer",
        default="",
        metavar="NAMES",
        help="torch; of step and gpu also torch_amp, torch_best: PyTorch in turns",
    )
    parser.add_argument(
        "--shrink", action="store_true", help="gpu at toy size, on any device"
    )
    return parser


def _measure(
    args: argparse.Namespace, given: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Figures by method."""
    if args.what == "methods":
        configs = {name: configuration(args, name) for name in presets.METHODS}
        return bench_methods(configs, args.steps)
    peers = args.peer.split(",") if args.peer else []
    if args.what == "gpu":
        make = functools.partial(configuration, args)
        found = bench_gpu(make, presets.METHODS, args.steps, peers, shrink=args.shrink)
        return {args.method: found}
    config = configuration(args, args.method)
    whole = PROTOCOLS[config.eval.protocol].whole_images
    if args.what == "eval" and "crop" in given and whole:
        raise ValueError(
            "--crop is for data sets that are evaluated in windows; "
            f"{args.dataset} is evaluated whole"
        )
    check_peers(config, args.what, peers)
    if args.what == "eval":
        made_up = MadeUp(args.images, args.sizes, args.largest)
        found = bench_eval(config, args.steps, made_up, peer=bool(peers))
    elif args.what == "data" and args.images:
        found = bench_made_up(
            config, args.steps, images=args.images, largest=args.largest
        )
    elif args.what == "data":
        found = bench_prepared(config, args.steps)
    elif args.what == "scaling":
        found = bench_scaling(config, args.steps)
    elif args.what == "fits":
        found = bench_fits(config, args.steps)
    elif args.what == "compile":
        found = _compile(config, args)
    elif args.what == "mpmc":
        found = bench_mpmc(config, args.steps)
    elif peers:
        found = bench_peers(config, args.steps, peers)
    else:
        profile = as_path("--profile", args.profile) if args.profile else None
        found = bench_step(config, args.steps, profile)
    return {args.method: found}


def _compile(
    config: ml_collections.ConfigDict, args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of a program that is not run."""
    gpu = parse_topology(args.topology)
    if gpu is None:
        return bench_compile(config, args.topology)
    name, count = gpu
    before = None
    if args.against:
        before = read_program(as_path("--against", args.against))
    found = bench_gpu_program(config, name, count, top=args.top, fits=args.fits)
    if args.peer:
        kernels, peak = count_peer(config)
        found["torch"] = figures(kernels, RATES[name], count, args.top)
        found["torch"]["peak_bytes"] = peak
    print(table(found, before), file=sys.stderr)
    return {**found, "over_file": ratios(found, before)} if before else found


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = _parser()
    args = parser.parse_args(arguments)
    cli.keep_memory()
    with cli.user_errors():
        given = _given(parser, arguments) - {"what"}
        for name, value in DEFAULTS.get(args.what, {}).items():
            setattr(args, name, getattr(args, name) if name in given else value)
        check_arguments(args, given)
        found = _measure(args, given)
        made_up = args.what in ("data", "eval") and args.images
        data = {"dataset": "made-up" if made_up else args.dataset}
        manifest = make_manifest(base.get_base().seed, data)
        for name, figures in found.items():
            line = {**vars(args), "method": name, **figures, "manifest": manifest}
            print(to_json(line))


if __name__ == "__main__":
    main()
