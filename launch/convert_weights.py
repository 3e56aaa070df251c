r"""Converts weights between PyTorch's layout and this package's.

python -m launch.convert_weights --input=resnet50.pth --output=resnet50.safetensors
python -m launch.convert_weights --input=runs/voc --output=voc.safetensors \
    [--checkpoint=best] [--layout=torch]

INPUT is a file (.safetensors, .npz, or .pth with PyTorch 2.6 or later) or the directory
of a run. Network, stem, depth and heads are detected from the keys, and a key that does
not belong to them is an error. --config.model.pretrained=OUTPUT begins a run with the
result. Only the network is written: predictions do not need the patch classifier.
mpmc_jax.load_run(OUTPUT) predicts with the weights of a run; launch.export writes them
with a model card.
"""

import argparse
import pathlib

import jax

from launch import cli
from mpmc_jax.experiments import exported
from mpmc_jax.experiments import run as runs
from mpmc_jax.models.registry import title
from mpmc_jax.models.weights import convert as weights_lib
from mpmc_jax.models.weights import files as weight_files
from mpmc_jax.models.weights.convert import Weights
from mpmc_jax.models.weights.torch_names import torch_state_dict
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity


def read(args: argparse.Namespace) -> Weights:
    """Reads the weights of --input, or the part of them that --part names.

    Raises:
      ValueError, FileNotFoundError: the file or run is missing or damaged.
    """
    path = as_path("--input", args.input)
    if path.is_dir():
        if args.state:
            raise ValueError(f"--state={args.state} is for a .pth; {path} is a run")
        checkpoint = args.checkpoint or "best"
        run = runs.load_run(path, checkpoint)
        found = exported.export(run, path.name, checkpoint)
    else:
        if args.checkpoint:
            raise ValueError(
                f"--checkpoint={args.checkpoint} is for a run; {path} is not a folder"
            )
        found = weights_lib.load(path, args.state)
    return found.encoder() if args.part == "encoder" else found


def write(path: pathlib.Path, weights: Weights, layout: str) -> None:
    """Writes the weights in this package's layout, or with PyTorch's keys.

    Raises:
      ValueError: see `weights.save` and `torch_state_dict`.
    """
    if layout == "mpmc":
        weights_lib.save(path, weights)
        return
    arrays = torch_state_dict(weights.variables, weights.model)
    weight_files.write(path, arrays, weights.origin)


def summary(weights: Weights) -> str:
    """Describes the network: its size, classes and heads, and where it is from."""
    model = weights.model
    network = title(model) if weights.whole else f"the encoder of {title(model)}"
    heads = [name for name in ("embedding", "auxiliary") if getattr(model, name)]
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"]))
    channels = quantity(model.in_channels, "channel")
    lines = [f"{network}, {channels}, {count:,} parameters"]
    if weights.whole:
        further = ", ".join(heads) or "none"
        lines.append(
            f"{quantity(model.num_classes, 'class')}; further heads: {further}"
        )
    lines.append(f"from {', '.join(f'{k} {v}' for k, v in weights.origin.items())}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("convert_weights", __doc__)
    parser.add_argument("--input", required=True, help="a file, or a run's directory")
    parser.add_argument("--output", required=True, help="a .safetensors file")
    parser.add_argument("--layout", default="mpmc", choices=["mpmc", "torch"])
    parser.add_argument("--part", default="all", choices=["all", "encoder"])
    parser.add_argument(
        "--state", default="", help="name of the network, for a .pth that holds several"
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help="of a run: best (the default), last or a step",
    )
    args = parser.parse_args(arguments)
    with cli.user_errors():
        output = as_path("--output", args.output)
        if output.suffix != ".safetensors":
            raise ValueError(f"--output={output}: name a .safetensors file")
        if output.exists() and output.samefile(as_path("--input", args.input)):
            raise ValueError(f"--output={output} is the input; name another file")
        found = read(args)
        write(output, found, args.layout)
        print(printable(summary(found), keep="\n"))
        print(printable(f"written to {output}, sha256 {weight_files.checksum(output)}"))


if __name__ == "__main__":
    main()
