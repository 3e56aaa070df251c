"""Compares the vision transformers with timm's, on the same random weights.

    python -m launch.bench.pytorch.vit > results/vit_timm/cpu.jsonl

Needs torch and timm, which are no requirements. Weights are written with the published
keys, and timm loads them without leftovers. timm antialiases resized position
embeddings, which Meta's code does not, so those are compared with PyTorch's
interpolation alone. One JSON object per comparison, with the largest difference.
"""

import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import cli
from mpmc_jax.models import ModelConfig, build_segmenter, init_variables
from mpmc_jax.models.encoders import vit
from mpmc_jax.models.weights.torch_names import torch_state_dict

# Our name, timm's, and the side of the images.
_NETWORKS = (
    ("dinov2_s14", "vit_small_patch14_dinov2", 518),
    ("dinov2_b14", "vit_base_patch14_dinov2", 518),
    ("vit_s16", "vit_small_patch16_384", 384),
    ("vit_b16", "vit_base_patch16_384", 384),
)
# Patches of crops of 798 x 798 and of 504 x 378 pixels.
_GRIDS = ((57, 57), (36, 27))


def compare_taps(backbone: str, name: str, side: int) -> list[dict[str, Any]]:
    """Compares the four levels of one network."""
    timm, torch = _peers()
    config = ModelConfig(name="dpt", backbone=backbone, image_size=side)
    spec = vit.BACKBONES[backbone]
    params = init_variables(jax.random.key(0), config)["params"]
    # Biases and scales differ from 0 and 1, so that none can be exchanged.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), params
    )
    encoder = {"params": {"backbone": params["backbone"]}}
    peer = timm.create_model(name, img_size=side, num_classes=0).eval()
    for module in peer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = spec.family.epsilon
    state = torch_state_dict(encoder, config)
    peer.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    images = rng.standard_normal((1, side, side, 3), np.float32)
    with torch.no_grad():
        wanted = peer.get_intermediate_layers(
            torch.tensor(images).permute(0, 3, 1, 2),
            n=list(spec.levels),
            reshape=True,
            norm=True,
        )
    apply: Any = build_segmenter(config).apply
    encode = jax.jit(lambda v, x: apply(v, x, method="encode"))
    features = encode({"params": params}, images)
    return [
        {
            "network": backbone,
            "what": vit.tap_name(level),
            "size": [side, side],
            **difference(
                features.taps[vit.tap_name(level)][0], each[0].permute(1, 2, 0)
            ),
        }
        for level, each in zip(spec.levels, wanted, strict=True)
    ]


def compare_positions(grid: tuple[int, int]) -> dict[str, Any]:
    """Compares DINOv2's resized position embeddings with PyTorch's interpolation."""
    _, torch = _peers()
    family = vit.DINOV2
    side, offset = family.grid or 0, family.offset or 0.0
    rng = np.random.default_rng(0)
    position = rng.standard_normal((1, 1 + side**2, 384), np.float32)
    ours = vit.resize_position(jnp.asarray(position), grid, offset)
    square = torch.tensor(position[:, 1:]).reshape(1, side, side, -1)
    scales = tuple((n + offset) / side for n in grid)
    wanted = torch.nn.functional.interpolate(
        square.permute(0, 3, 1, 2), scale_factor=scales, mode="bicubic"
    ).permute(0, 2, 3, 1)
    return {
        "network": "dinov2_s14",
        "what": "position",
        "size": [n * family.patch for n in grid],
        **difference(ours[0, 1:].reshape(wanted.shape[1:]), wanted[0]),
    }


def _peers() -> tuple[Any, Any]:
    """Imports timm and torch, which the project does not require."""
    return importlib.import_module("timm"), importlib.import_module("torch")


def difference(ours: Any, theirs: Any) -> dict[str, float]:
    """Returns the largest absolute difference, and the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return {
        "difference": float(np.abs(ours - theirs).max()),
        "largest": float(np.abs(theirs).max()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Prints one line per comparison."""
    cli.parser("bench.pytorch.vit", __doc__).parse_args(arguments)
    lines = [line for network in _NETWORKS for line in compare_taps(*network)]
    lines += [compare_positions(grid) for grid in _GRIDS]
    timm, torch = _peers()
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    for line in lines:
        print(json.dumps({**line, "jax": jax.__version__, **versions}))


if __name__ == "__main__":
    main()
