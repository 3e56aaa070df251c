"""The UniMatch V2 step in PyTorch, on the views that ours drew.

Needs torch. As in the published implementation: AdamW, the loop that averages the
parameters, the partner by `flip`; attention as `scaled_dot_product_attention`.
"""

# pyright: reportMissingImports=false

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from launch.bench.pytorch import dinov2_dpt
from launch.bench.pytorch.step import TorchPeer, decided, paste
from mpmc_jax.experiments.build import Setup
from mpmc_jax.methods import unimatch_v2
from mpmc_jax.types import IGNORE_LABEL


class TorchPeerV2(TorchPeer):
    """A step of UniMatch V2 without MPMC, on a single group."""

    def _build(self, setup: Setup) -> Any:
        assert isinstance(setup.step.method, unimatch_v2.UniMatchV2)
        self._method, self._supervised = setup.step.method, setup.step.supervised_loss
        self._steps = 0
        model = setup.model
        return dinov2_dpt.Segmenter(model.backbone, model.num_classes, model.width)

    def _build_optimizer(self, rates: Mapping[str, Any]) -> Any:
        self._teacher = copy.deepcopy(self._network).eval().requires_grad_(False)
        groups = self._groups(rates["lr"], rates["head_multiplier"])
        return torch.optim.AdamW(
            groups,
            lr=rates["lr"],
            betas=tuple(rates["betas"]),
            eps=rates["eps"],
            weight_decay=rates["weight_decay"],
            # The default on a GPU.
            foreach=True,
        )

    def _moved(self, inputs: Any) -> dict[str, Any]:
        assert isinstance(inputs, unimatch_v2.Inputs)
        mask = next(iter(inputs.perturbation.values()))
        return {
            "image": self._image(inputs.image),
            "label": self._plain(inputs.label).long(),
            "weak": self._image(inputs.weak),
            "real": self._plain(inputs.real),
            "strong": [self._image(x) for x in inputs.strong],
            "boxes": [self._plain(x) for x in inputs.masks],
            "mask": self._plain(mask[:, 0]).to(self._dtype),
        }

    def update(self) -> Any:
        """One update, then that of the average."""
        loss = super().update()
        decay = min(1 - 1 / (self._steps + 1), self._method.ema_decay)
        self._steps += 1
        with torch.no_grad():
            for ours, averaged in zip(
                self._network.parameters(), self._teacher.parameters(), strict=True
            ):
                averaged.copy_(averaged * decay + ours.detach() * (1 - decay))
        return loss

    def _loss(self) -> Any:
        x = self._inputs
        with torch.no_grad():
            confidence, label = decided(self._teacher(x["weak"]))
        strong = [
            paste(box, view.flip(0), view)
            for box, view in zip(x["boxes"], x["strong"], strict=True)
        ]
        plain = self._pass(x["image"])
        both = self._pass(torch.cat(strong), x["mask"])
        terms = []
        for box, logits in zip(x["boxes"], both.chunk(2), strict=True):
            target, sure, real = (
                paste(box, each.flip(0), each)
                for each in (label, confidence, x["real"])
            )
            pixel = F.cross_entropy(logits.float(), target, reduction="none")
            kept = (sure >= self._method.threshold) & real
            terms.append((pixel * kept).sum() / real.sum())
        return (self._labeled(plain.float(), x["label"]) + sum(terms) / 2) / 2

    def _labeled(self, logits: Any, label: Any) -> Any:
        if self._supervised.name == "ohem":
            label = self._hard(logits.detach(), label)
        return F.cross_entropy(logits, label, ignore_index=IGNORE_LABEL)

    def _hard(self, logits: Any, label: Any) -> Any:
        """The labels of hard pixels, without branches that need a value."""
        settings = self._supervised
        valid = label != IGNORE_LABEL
        own = logits.softmax(1).gather(1, torch.where(valid, label, 0)[:, None])[:, 0]
        own = torch.where(valid, own, 1)
        kept = min(settings.min_kept, label.numel())
        border = own.flatten().kthvalue(kept).values.clamp(min=settings.threshold)
        easy = (own > border) & (valid.sum() >= settings.min_kept)
        return torch.where(easy, IGNORE_LABEL, label)
