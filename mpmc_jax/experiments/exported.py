"""Weights of a run to publish: a file that predicts, and its model card.

`load_run` reads the file back.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from mpmc_jax.experiments.run import Run
from mpmc_jax.models.registry import title
from mpmc_jax.models.weights.convert import Weights
from mpmc_jax.text import quantity
from mpmc_jax.training import workdir

# The first lines of a model card.
CARD_BEGINS = "---\nlibrary_name: mpmc_jax\n"
_CARD = (
    CARD_BEGINS
    + """pipeline_tag: image-segmentation
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
"""
)


def export(run: Run, name: str, checkpoint: str) -> Weights:
    """Returns the network that a run is evaluated with, and what it needs to predict.

    Args:
      run: the run.
      name: of its directory.
      checkpoint: the one that was loaded: "best", "last" or a step.
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
    }
    return Weights(
        run.model,
        whole=True,
        variables=jax.tree.map(np.asarray, run.variables),
        origin=origin,
        run=workdir.trained_on(run.config, needed),
    )


def model_card(weights: Weights, file: str) -> str:
    """Writes the model card of a run's weights, as the Hugging Face hub reads it.

    Args:
      weights: from `export`, or read from its file.
      file: name of the file.

    Raises:
      ValueError: they are not the whole network of a run.
    """
    run = weights.run
    if not run:
        raise ValueError("--card is for the whole network of a run: --input=RUN")
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
    )


def _begun(origin: dict[str, Any]) -> str:
    """Names the weights that a run began with, and their license."""
    if not origin:
        return "random weights"
    license_ = f" ({origin['license']})" if "license" in origin else ""
    return f"{origin.get('hub', origin['file'])}{license_}"
