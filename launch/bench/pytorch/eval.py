"""Evaluation in PyTorch as published code does it: one image at a time, as it is.

Needs torch.
"""

# pyright: reportMissingImports=false

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from launch.bench.pytorch import network as peer_network
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL


def make_evaluation(
    model: ModelConfig, weights: Mapping[str, np.ndarray], pixels: PixelFormat
) -> Any:
    """A function that takes examples and returns their (C,C) confusion, rows truth."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = peer_network.Segmenter(model.backbone, model.num_classes, model.width)
    peer_network.load(network, weights)
    network = network.to(device).eval()
    mean, std = (
        torch.tensor(x, dtype=torch.float32, device=device)[:, None, None]
        for x in (pixels.mean, pixels.std)
    )

    @torch.inference_mode()
    def evaluate(examples: Any) -> np.ndarray:
        classes = model.num_classes
        confusion = torch.zeros(classes**2, dtype=torch.long, device=device)
        for index in range(len(examples)):
            example = examples[index]
            image = torch.from_numpy(example.image).to(device).permute(2, 0, 1)
            logits = network((image / 255 - mean)[None] / std)[0]
            truth = torch.from_numpy(example.label).to(device).long()
            counted = truth != IGNORE_LABEL
            pairs = truth * classes + logits[0].argmax(0)
            confusion += torch.bincount(pairs[counted], minlength=classes**2)
        return confusion.reshape(classes, classes).cpu().numpy()

    return evaluate
