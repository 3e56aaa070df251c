r"""Evaluates a checkpoint of a run on a labeled split.

python -m launch.evaluate --workdir=runs/camvid [--checkpoint=best|last|STEP] \
    [--split=val] [--protocol=NAME] [--crop=N] [--scales=0.5,1,1.5] [--flip] \
    [--pad_to=N] [--data_dir=DIR] [--dataset=NAME --other_data]

python -m launch.evaluate --weights=FILE --dataset=NAME [--data_dir=data] [--crop=N] ...

Of several processes (as for launch.train) each evaluates a share of the images.

The first evaluates a run, the second a whole network that launch.convert_weights wrote
or PyTorch saved, on a prepared data set. The protocol is the run's, or what the
network's authors published, unless another is named; images keep their own size unless
--pad_to says otherwise. Prints a table and writes eval_<split>_<checkpoint>.json to the
run's directory. What --protocol, --crop, --scales, --flip and --pad_to ask for is added
to the name, as in eval_val_best_slide_ael_crop_801_scales_0.5-1.0_flip.json, so that a
result only replaces an earlier one of the same kind.

--data_dir finds a run's data set where it lies now. With --other_data it may be another
of the same classes and channels; the name then ends in _on_<dataset>_<fingerprint>, as
that of a file's result does: eval_<split>_<file>_on_<dataset>_<fingerprint>.json,
beside FILE.
"""

import argparse
import pathlib

import jax
import ml_collections

from configs import base, presets
from launch import cli, multihost
from mpmc_jax.atomic_write import write_json
from mpmc_jax.data.lists import printable
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.protocols import PROTOCOLS
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.evaluation.volumes import VolumeScores
from mpmc_jax.experiments import pretrained
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.training.manifest import make_manifest


def evaluate(run: runs.Run, split: str) -> EvalResult:
    """Evaluates an opened run on one split of its data set.

    Raises:
      ValueError, FileNotFoundError: a protocol or data set that does not fit.
    """
    evaluator = runs.make_evaluator(run.config, run.module, run.facts)
    return evaluator.run(run.variables, runs.open_split(run, split), run.probe)


def configure(config: ml_collections.ConfigDict, args: argparse.Namespace) -> None:
    """Sets what the arguments ask for.

    Raises:
      ValueError: scales that are no numbers, or an argument that the protocol does not
        use.
    """
    config.eval.pad_to = args.pad_to
    if args.protocol:
        config.eval.protocol = args.protocol
    protocol = PROTOCOLS[config.eval.protocol]
    if args.pad_to and not protocol.pads:
        raise ValueError(
            f"--pad_to={args.pad_to} is for --protocol=whole; this is {protocol.name}"
        )
    if args.crop is not None:
        if protocol.pads:  # whole images
            raise ValueError(
                f"--crop={args.crop} is for protocols with windows; {protocol.name} "
                "takes images at their own size"
            )
        config.data.crop = args.crop
    if args.flip:
        config.eval.flip = True
    if args.scales:
        try:
            config.eval.scales = tuple(map(float, args.scales.split(",")))
        except ValueError:
            raise ValueError(
                f"--scales={args.scales}: numbers separated by commas, such as 0.5,1"
            ) from None


def record(run: runs.Run, split: str, checkpoint: str, result: EvalResult) -> dict:
    """What is written of an evaluation: figures, counts and circumstances."""
    settings = run.config.eval
    return {
        "split": split,
        "partial": run.facts.partial,
        "protocol": result.protocol,
        "window": run.config.data.crop,
        "scales": list(settings.scales),
        "flip": settings.flip,
        "checkpoint": checkpoint,
        "step": run.step,
        "network": run.network_name,
        "pad_to": result.pad_to,
        "num_images": result.num_images,
        "trained_on": run.manifest.get("data", {}).get("fingerprint"),
        "seconds": result.seconds,
        "class_names": list(run.facts.class_names),
        "scalars": result.scalars(run.facts.class_names),
        "confusion": result.confusion.tolist(),
        "volumes": None if result.volumes is None else _listed(result.volumes),
        "run": run.manifest,
        "manifest": make_manifest(
            run.config.seed,
            {
                "dataset": run.facts.dataset,
                "fingerprint": run.facts.fingerprint,
                "partial": run.facts.partial,
            },
        ),
    }


def _listed(volumes: VolumeScores) -> list:
    """Figures by volume, class and kind; None where one is undefined."""
    return [
        [[None if value != value else value for value in kinds] for kinds in classes]
        for classes in volumes.values.tolist()
    ]


def open_what(args: argparse.Namespace) -> tuple[runs.Run, pathlib.Path, str]:
    """The network, the folder of its results, and what they call it.

    Raises:
      ValueError, FileNotFoundError: neither or both of run and file, or see
        `runs.open_run` and `pretrained.open_weights`.
    """
    if bool(args.workdir) == bool(args.weights):
        raise ValueError("give --workdir=DIR, or --weights=FILE and --dataset=NAME")
    if args.workdir:
        workdir = as_path("--workdir", args.workdir)
        run = runs.open_run(workdir, args.checkpoint or "best")
        run = runs.use_data(run, args.data_dir, args.dataset, other=args.other_data)
        return run, workdir, args.checkpoint or "best"
    if not args.dataset:
        raise ValueError("--weights needs --dataset=NAME, one that is prepared")
    for name in ("checkpoint", "other_data"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for a run; --weights names a file")
    path = as_path("--weights", args.weights)
    data_dir = str(as_path("--data_dir", args.data_dir or "data"))

    def configure(method: str) -> ml_collections.ConfigDict:
        """What the network's authors published for the data set."""
        config = base.get_base()
        config.data.name, config.data.data_dir = args.dataset, data_dir
        presets.apply(config, f"method={method}" if method else "")
        return config

    run = pretrained.open_weights(path, configure)
    return run, path.parent, path.stem


def result_name(run: runs.Run, args: argparse.Namespace, title: str) -> str:
    """The result's file name, which says all that was asked for; see the module."""
    scales = "-".join(map(str, run.config.eval.scales))
    on = f"on_{run.facts.dataset}_{run.facts.fingerprint[:8]}"
    parts = (
        f"eval_{args.split}_{title}",
        args.protocol,
        args.crop is not None and f"crop_{args.crop}",
        args.scales and f"scales_{scales}",
        args.flip and "flip",
        args.pad_to and f"pad_to_{args.pad_to}",
        (args.other_data or args.weights) and on,
    )
    return f"{'_'.join(part for part in parts if part)}.json"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("evaluate", __doc__)
    cli.add_run(parser, checkpoint="", required=False)
    parser.add_argument("--weights", default="", help="a file instead of a run")
    parser.add_argument("--dataset", default="", help="the run's, or that of --weights")
    cli.add_data_dir(parser)
    parser.add_argument(
        "--other_data",
        action="store_true",
        help="evaluate a run on another data set than it was trained on",
    )
    parser.add_argument("--crop", type=int, help="side of the windows: the run's")
    parser.add_argument("--split", default="val", help="split to evaluate on")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), help="the run's")
    parser.add_argument("--scales", default="", help="factors, separated by commas")
    parser.add_argument("--flip", action="store_true", help="see images mirrored too")
    parser.add_argument("--pad_to", type=int, default=0, help="0 is exact")
    multihost.add_arguments(parser)
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with multihost.ending_together(), cli.user_errors():
        multihost.join(
            found=args.distributed,
            coordinator=args.coordinator,
            count=args.processes,
            index=args.process,
        )
        run, folder, title = open_what(args)
        configure(run.config, args)
        runs.check_same(run, args.split)
        result = evaluate(run, args.split)
        if jax.process_index() > 0:
            return
        path = folder / result_name(run, args, title)
        write_json(path, record(run, args.split, title, result))
        mark = ", partial data set" if run.facts.partial else ""
        if args.other_data:
            mark += f", on {run.facts.dataset} {run.facts.fingerprint[:8]}"
        which = f"{run.network_name} of step {run.step} ({title})"
        print(f"{args.split}, {which if args.workdir else args.weights}{mark}")
        print(format_table(result, run.facts.class_names))
        print(printable(f"written to {path}"))


if __name__ == "__main__":
    main()
