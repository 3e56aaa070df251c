"""A run as a folder to deploy or to publish.

Its weights with their model card, which `load_run` reads back, and programs that
predict without this package, each with a loader of a few lines. Folders of the machine
that trained the run are left out of all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import ml_collections
import numpy as np

from mpmc_jax.atomic_write import write_bytes, write_json, write_text
from mpmc_jax.experiments import base_config, programs
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.registry import title
from mpmc_jax.models.weights import convert, hub
from mpmc_jax.models.weights.convert import Weights
from mpmc_jax.text import quantity
from mpmc_jax.training import workdir
from mpmc_jax.training.metric_writer import read_metrics

_CARD = """---
library_name: mpmc_jax
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- jax
---

# {network} on {dataset}

```python
from mpmc_jax import load_run
run = load_run("{file}")  # from the hub: load_run("hub:OWNER/NAME/{file}")
classes = run.predict("image.jpg")  # (height, width) uint8
```

| | |
|---|---|
| network | {network}, {parameters:,} parameters |
| images | {images} |
| classes | {classes} |
| trained by | `{method}`{plugin}, {steps}, on {dataset}, split `{split}` |
| began with | {begun} |
| weights | those of `{which}` |
{scores}"""
_LOADER = '''"""Segments images, with {packages} alone.

python predict_{form}.py IMAGES.npy CLASSES.npy
"""

import pathlib
import sys

{imports}


def load(file):
    """Returns the function from images {shape} {dtype} to classes, probabilities."""
{load}


if __name__ == "__main__":
    program = load(pathlib.Path(__file__).with_name("{file}"))
    classes, probabilities = program(np.load(sys.argv[1]))
    np.save(sys.argv[2], classes)
'''
# Format of a program -> what its loader needs.
_LOADERS = {
    "stablehlo": {
        "packages": "jax, flatbuffers and numpy",
        "imports": "import numpy as np\nfrom jax import export",
        "load": """    with open(file, "rb") as program:
        return export.deserialize(bytearray(program.read())).call""",
    },
    "onnx": {
        "packages": "onnxruntime and numpy",
        "imports": "import numpy as np\nimport onnxruntime",
        "load": """    session = onnxruntime.InferenceSession(str(file))
    return lambda images: session.run(None, {"images": images})""",
    },
}


def read_scores(directory: Path, step: int) -> dict[str, float]:
    """Reads a run's scores on the validation split at a step; {} if there are none."""
    path = directory / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return {
        name.removeprefix("val/"): value
        for line in lines
        if line["step"] == step
        for name, value in line.items()
        if name.startswith(("val/miou", "val/iou/", "val/dice")) and value is not None
    }


def export(
    run: Run, name: str, checkpoint: str, scores: Mapping[str, float] | None = None
) -> Weights:
    """Returns the network that a run is evaluated with, and what it needs to predict.

    Args:
      run: the run.
      name: of its directory.
      checkpoint: the one that was loaded: "best", "last" or a step.
      scores: its scores on the validation split, for the model card.
    """
    origin = {
        "file": name,
        "network": run.network_name,
        "step": str(run.step),
        "checkpoint": checkpoint,
        "dataset": run.facts.dataset,
        "partial": str(run.facts.partial),
    }
    needed = {
        "data": dataclasses.asdict(run.facts),
        "step": run.step,
        "network": run.network_name,
        "pretrained": run.manifest.get("pretrained") or {},
        "scores": dict(scores or {}),
    }
    return Weights(
        run.model,
        whole=True,
        variables=jax.tree.map(np.asarray, run.variables),
        origin=origin,
        run=workdir.trained_on(_without_folders(run.config), needed),
    )


def _without_folders(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a configuration whose files have no folder, to be published."""
    made = config.copy_and_resolve_references()
    made.data.data_dir = base_config.get_base().data.data_dir
    for section, key in (
        (made.data, "labeled_ids"),
        (made.data, "unlabeled_ids"),
        (made.model, "pretrained"),
    ):
        if hub.parse(section[key]) is None:
            section[key] = PurePath(section[key]).name
    return made


def write_weights(
    run: Run,
    folder: Path,
    name: str,
    checkpoint: str,
    scores: Mapping[str, float] | None = None,
) -> list[Path]:
    """Writes weights.safetensors and README.md; for the arguments, see `export`."""
    path = folder / "weights.safetensors"
    weights = export(run, name, checkpoint, scores)
    convert.save(path, weights)
    card = folder / "README.md"
    write_text(card, model_card(weights, path.name))
    return [path, card]


def write_description(run: Run, folder: Path) -> list[Path]:
    """Writes the run's settings, and its classes with their colors, as JSON."""
    facts = run.facts
    classes = [
        {"index": index, "name": name, "color": color}
        for index, (name, color) in enumerate(
            zip(facts.class_names, facts.palette, strict=True)
        )
    ]
    written = []
    for name, content in (
        ("config.json", _without_folders(run.config).to_dict()),
        ("classes.json", classes),
    ):
        written.append(folder / name)
        write_json(written[-1], content)
    return written


def write_programs(
    run: Run,
    folder: Path,
    form: str,
    sizes: Sequence[programs.Size],
    platforms: Sequence[str] = programs.PLATFORMS,
) -> list[Path]:
    """Writes a program for each size, and the loader.

    Args:
      run: the run.
      folder: where to.
      form: "stablehlo" or "onnx".
      sizes: rows and columns of the images; None for any.
      platforms: of StableHLO, see `programs.to_stablehlo`.

    Raises:
      ValueError: see `programs`.
    """
    written = []
    for size in sizes:
        if form == "onnx":
            content = programs.to_onnx(run, size)
        else:
            content = programs.to_stablehlo(run, size, platforms)
        label = "any" if size is None else f"{size[0]}x{size[1]}"
        written.append(folder / f"segment_{label}.{form}")
        write_bytes(written[-1], content)
    pixels = run.facts.pixels
    sides = sizes[0] or ("rows", "columns")
    shape = f"(count, {sides[0]}, {sides[1]}, {pixels.channels})"
    loader = folder / f"predict_{form}.py"
    about = {"form": form, "shape": shape, "dtype": pixels.dtype}
    text = _LOADER.format(file=written[0].name, **about, **_LOADERS[form])
    write_text(loader, text)
    return [*written, loader]


def model_card(weights: Weights, file: str) -> str:
    """Writes the model card of a run's weights, as the Hugging Face hub reads it.

    Args:
      weights: from `export`.
      file: name of their file.
    """
    run = weights.run
    config, data = run["config"], run["data"]
    pixels = data["pixels"]
    mean, std = (
        ", ".join(f"{each:.4g}" for each in pixels[name]) for name in ("mean", "std")
    )
    parameters = jax.tree.leaves(weights.variables["params"])
    return _CARD.format(
        network=title(weights.model),
        dataset=data["dataset"],
        file=file,
        parameters=sum(leaf.size for leaf in parameters),
        images=f"{quantity(pixels['channels'], 'channel')}, {pixels['dtype']}; mean "
        f"{mean} and deviation {std} of the unit values",
        classes=", ".join(data["class_names"]),
        method=config["method"]["name"],
        plugin=" with MPMC" if config["mpmc"]["enabled"] else "",
        steps=quantity(run["step"], "step"),
        split=config["data"]["split"],
        begun=_begun(run["pretrained"]),
        which=run["network"],
        scores="".join(
            f"| {name} on the validation split | {value:.4f} |\n"
            for name, value in run["scores"].items()
        ),
    )


def _begun(origin: dict[str, Any]) -> str:
    """Names the weights that a run began with, and their license."""
    if not origin:
        return "random weights"
    license_ = f" ({origin['license']})" if "license" in origin else ""
    return f"{origin.get('hub', origin['file'])}{license_}"
