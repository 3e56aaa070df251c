r"""Evaluates a checkpoint of a run on a labeled split.

python -m launch.evaluate --workdir=runs/camvid [--checkpoint=best|last|STEP] \
    [--split=val] [--protocol=NAME] [--crop=N] [--scales=0.5,1,1.5] [--flip] \
    [--pad_to=N] [--data_dir=DIR] [--dataset=NAME --other_data]

python -m launch.evaluate --weights=FILE --dataset=NAME [--data_dir=data] [--crop=N] ...

The first form evaluates a run. The second evaluates, on a prepared data set, a whole
network that launch.convert_weights or PyTorch saved. With several processes (as for
launch.train) each evaluates a part of the images.

The protocol is the run's, or that of the network's authors, unless --protocol names
another; images keep their own size unless --pad_to says otherwise. Prints a table and
writes eval_<split>_<checkpoint>.json to the run's directory. The options --protocol,
--crop, --scales, --flip and --pad_to are added to the file's name, as in
eval_val_best_slide_ael_crop_801_scales_0.5-1.0_flip.json, so that a result replaces
only an earlier one of the same kind.

--data_dir finds a run's data set in another folder. With --other_data it may be another
data set of the same classes and channels; the name then ends in
_on_<dataset>_<fingerprint>. So does the name of a file's result:
eval_<split>_<file>_on_<dataset>_<fingerprint>.json, beside FILE.
"""

import argparse
import pathlib

import jax
import ml_collections

from configs import base, presets
from launch import cli, multihost
from mpmc_jax.atomic_write import check_writable, write_json
from mpmc_jax.evaluation.protocols import PROTOCOLS
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.experiments import pretrained
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable


def open_network(args: argparse.Namespace) -> tuple[runs.Run, pathlib.Path, str]:
    """Opens the run or file that the arguments name.

    Returns:
      The network as a run, the folder for its results, and their label: the checkpoint
      or the file's name.

    Raises:
      ValueError, FileNotFoundError: neither or both of run and file, or see
        `runs.load_run` and `pretrained.open_weights`.
    """
    if bool(args.workdir) == bool(args.weights):
        raise ValueError("give --workdir=DIR, or --weights=FILE and --dataset=NAME")
    if args.workdir:
        workdir = as_path("--workdir", args.workdir)
        checkpoint = args.checkpoint or "best"
        run = runs.load_run(workdir, checkpoint)
        run = runs.use_data(run, args.data_dir, args.dataset, other=args.other_data)
        return run, workdir, checkpoint
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

    return pretrained.open_weights(path, configure), path.parent, path.stem


def result_name(run: runs.Run, args: argparse.Namespace, label: str) -> str:
    """The result's file name, with every option that was given; see the module."""
    scales = "-".join(map(str, run.config.eval.scales))
    data = f"on_{run.facts.dataset}_{run.facts.fingerprint[:8]}"
    parts = (
        f"eval_{args.split}_{label}",
        args.protocol,
        args.crop is not None and f"crop_{args.crop}",
        args.scales and f"scales_{scales}",
        args.flip and "flip",
        args.pad_to and f"pad_to_{args.pad_to}",
        (args.other_data or args.weights) and data,
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
    with multihost.exit_on_failure(), cli.user_errors():
        multihost.join(
            discover=args.distributed,
            coordinator=args.coordinator,
            count=args.processes,
            index=args.process,
        )
        run, folder, label = open_network(args)
        run = runs.with_protocol(
            run,
            protocol=args.protocol or "",
            crop=args.crop,
            scales=cli.parse_scales(args.scales),
            flip=args.flip,
            pad_to=args.pad_to,
        )
        path = folder / result_name(run, args, label)
        if jax.process_index() == 0:
            check_writable(path.parent)
        result = runs.evaluate_split(run, args.split)
        if jax.process_index() > 0:
            return
        table = format_table(result, run.facts.class_names)
        try:
            write_json(path, runs.evaluation_content(run, args.split, label, result))
        except OSError:
            print(table)  # what was computed is not lost with the file
            raise
        notes = ", partial data set" if run.facts.partial else ""
        if args.other_data:
            notes += f", on {run.facts.dataset} {run.facts.fingerprint[:8]}"
        checkpoint = f"{run.network_name} of step {run.step} ({label})"
        print(f"{args.split}, {checkpoint if args.workdir else args.weights}{notes}")
        print(table)
        print(printable(f"written to {path}"))


if __name__ == "__main__":
    main()
