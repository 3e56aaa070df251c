"""The UniMatch step with MPMC in PyTorch, on the views that ours drew.

Needs torch. `TorchPeer` takes a run's configuration, weights and first batch of views,
so that its first loss equals ours and the times of both may be compared. The views
reach it finished: what making them costs (our step does it) is not counted.
"""

# pyright: reportMissingImports=false

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from launch.bench.pytorch import network as peer_network
from mpmc_jax.experiments.build import Setup
from mpmc_jax.methods import unimatch
from mpmc_jax.models.weights.torch_names import torch_state_dict
from mpmc_jax.plugins.mpmc import MPMC
from mpmc_jax.plugins.mpmc.patches import nearest_patch
from mpmc_jax.training.state import PLUGIN, TrainState
from mpmc_jax.types import IGNORE_LABEL


class TorchPeer:
    """A step of UniMatch, with MPMC if the run has it.

    Args:
      kind: "torch" is float32, convolutions in TF32 on a GPU; "torch_amp" bfloat16
        under autocast where `bfloat16`, and channels last; "torch_best" the same,
        compiled on a GPU.
      setup, state, inputs: the run's parts, its first state and the method's inputs.
      bfloat16: whether autocast may be used.
      optimizer: the configuration's section.
      device: "meta" computes shapes and no values, all in bfloat16 where `bfloat16`;
        "" is a GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        kind: str,
        setup: Setup,
        state: TrainState,
        inputs: Any,
        *,
        bfloat16: bool,
        optimizer: Mapping[str, Any],
        device: str = "",
    ) -> None:
        available = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = device or available
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        model = setup.model
        plain = kind == "torch"
        self._form = torch.contiguous_format if plain else torch.channels_last
        self._amp = bfloat16 and not plain
        shapes_only = self._device == "meta"
        self._dtype = torch.bfloat16 if shapes_only and bfloat16 else torch.float32
        self._plugin = (
            setup.step.plugin if isinstance(setup.step.plugin, MPMC) else None
        )
        self._alpha = setup.step.alpha
        network = self._build(setup)
        peer_network.load(network, _network_weights(setup, state))
        self._network, self._head = self._ready(network), None
        # Compiled where that pays: a CPU's compiler would have to be there.
        compiles = kind == "torch_best" and self._device == "cuda"
        self._pass = torch.compile(self._network) if compiles else self._network
        if self._plugin is not None:
            head = peer_network.PatchHead(
                self._plugin.head, 4 * model.width, model.num_classes
            )
            _load_head(head, state)
            self._head = self._ready(head)
        self._optimizer = self._build_optimizer(optimizer)
        self._inputs = self._moved(inputs)

    def _build(self, setup: Setup) -> Any:
        """Makes the network."""
        assert isinstance(setup.step.method, unimatch.UniMatch)
        self._threshold = setup.step.method.threshold
        model = setup.model
        return peer_network.Segmenter(model.backbone, model.num_classes, model.width)

    def _ready(self, module: Any) -> Any:
        module = module.to(self._device, self._dtype).train()
        return module.to(memory_format=self._form)

    def _build_optimizer(self, rates: Mapping[str, Any]) -> Any:
        groups = self._groups(rates["lr"], rates["head_multiplier"])
        return torch.optim.SGD(
            groups,
            lr=rates["lr"],
            momentum=rates["momentum"],
            weight_decay=rates["weight_decay"],
        )

    def _groups(self, lr: float, heads: float) -> list[dict[str, Any]]:
        """The parameters of the backbone, and all others, with their rates."""
        slow = list(self._network.backbone.parameters())
        fast = [
            p
            for name, p in self._network.named_parameters()
            if not name.startswith("backbone.")
        ]
        if self._head is not None:
            fast += list(self._head.parameters())
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": heads * lr}]

    def _image(self, x: Any) -> Any:
        """Images as a loader gives them: channels first, on the device."""
        tensor = torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))
        tensor = tensor.to(self._device, self._dtype)
        return tensor.contiguous(memory_format=self._form)

    def _plain(self, x: Any) -> Any:
        return torch.from_numpy(np.array(x)).to(self._device)

    def _moved(self, inputs: Any) -> dict[str, Any]:
        """The views, on the device."""
        assert isinstance(inputs, unimatch.Inputs)
        image, plain = self._image, self._plain
        return {
            "image": image(inputs.image),
            "label": plain(inputs.label).long(),
            "weak": image(inputs.weak),
            "partner": image(inputs.partner_weak),
            "strong": [image(x) for x in inputs.strong],
            "partner_strong": [image(x) for x in inputs.partner_strong],
            "boxes": [plain(x) for x in inputs.masks],
            "masks": [image(inputs.perturbation[tap]) for tap in ("layer1", "layer4")],
        }

    def step(self) -> float:
        """One update; the loss."""
        return self.update().item()

    def update(self) -> Any:
        """One update; the loss as a tensor, which on "meta" has no value."""
        with contextlib.ExitStack() as stack:
            if self._amp:
                stack.enter_context(torch.autocast(self._device, torch.bfloat16))
            loss = self._loss()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss

    def _loss(self) -> Any:
        x, b = self._inputs, len(self._inputs["image"])
        mixed_weak = [paste(box, x["partner"], x["weak"]) for box in x["boxes"]]
        taught = self._taught([x["weak"], *mixed_weak])
        with torch.no_grad():
            self._network.eval()
            partner = decided(self._pass(x["partner"])[0])
            self._network.train()
        images = torch.cat([x["image"], x["weak"]])
        logits, perturbed, low = self._pass(images, x["masks"])
        weak = decided(logits[b:].detach())
        strong = [
            paste(box, theirs, ours)
            for box, theirs, ours in zip(
                x["boxes"], x["partner_strong"], x["strong"], strict=True
            )
        ]
        both, _, low_strong = self._pass(torch.cat(strong))
        views = [(perturbed[b:], weak, low[b:] * x["masks"][0][b:], 2.0)]
        for i, box in enumerate(x["boxes"]):
            target = (
                paste(box, partner[0], weak[0]),
                paste(box, partner[1], weak[1]),
            )
            part = slice(i * b, (i + 1) * b)
            views.append((both[part], target, low_strong[part], 1.0))
        loss = F.cross_entropy(logits[:b].float(), x["label"], ignore_index=255)
        for i, (out, (confidence, label), _, coefficient) in enumerate(views):
            weight = (confidence >= self._threshold).float()
            if taught is not None:
                weight = weight * self._lambda(taught[i], label, weight > 0)
            pixel = F.cross_entropy(out.float(), label, reduction="none")
            loss = loss + self._alpha * coefficient * (weight * pixel).mean()
        if taught is not None:
            loss = loss + self._patch_losses(low[:b], views, taught)
        return loss / 2

    def _taught(self, images: list[Any]) -> list[Any] | None:
        """The teacher's patch logits of every view's weak image."""
        if self._head is None:
            return None
        with torch.no_grad():
            self._network.eval()
            self._head.eval()
            logits = self._head(self._network.backbone.low(torch.cat(images))).float()
            self._network.train()
            self._head.train()
        return list(logits.chunk(len(images)))

    def _lambda(self, logits: Any, label: Any, counted: Any) -> Any:
        """lambda_s of "softmax_prob", on the scale "none" or "mean"."""
        plugin = self._plugin
        assert plugin is not None
        gamma = logits.sigmoid().softmax(1)
        nearest = torch.from_numpy(
            nearest_patch(label.shape[1], gamma.shape[2], plugin.field)
        ).to(self._device, torch.long)
        at_pixels = gamma[:, :, nearest][:, :, :, nearest]
        picked = at_pixels.gather(1, label[:, None])[:, 0]
        if plugin.lambda_scale == "mean":
            mean = (picked * counted).sum() / counted.sum().clamp(min=1)
            picked = torch.where(mean > 0, picked / mean, picked)
        return picked

    def _patch_losses(self, labeled: Any, views: list[Any], taught: list[Any]) -> Any:
        plugin = self._plugin
        assert plugin is not None and self._head is not None
        logits = self._head(torch.cat([labeled, *(view[2] for view in views)])).float()
        first, *rest = logits.chunk(1 + len(views))
        target = _contained(self._inputs["label"], first.shape[1], plugin.field)
        positive = target * F.logsigmoid(first)
        negative = (1 - target) * first.sigmoid() * F.logsigmoid(-first)
        loss = -plugin.labeled_weight * (positive + negative).mean()
        total = sum(view[3] for view in views)
        for out, view, teacher in zip(rest, views, taught, strict=True):
            probability = teacher.sigmoid()
            weight = probability.softmax(1)
            entropy = F.binary_cross_entropy_with_logits(out, probability, weight)
            loss = loss + plugin.beta * view[3] / total * entropy
        return loss


def decided(logits: Any) -> tuple[Any, Any]:
    """Confidence and class of every pixel."""
    confidence, label = logits.float().softmax(1).max(1)
    return confidence, label


def paste(box: Any, inside: Any, outside: Any) -> Any:
    """Takes `inside` where the box is, `outside` elsewhere."""
    return torch.where(box[:, None] if inside.ndim == 4 else box, inside, outside)


def _contained(label: Any, classes: int, field: Any) -> Any:
    """(b,C,h,w) 1 where a patch contains the class; one axis after the other."""
    valid = label != IGNORE_LABEL
    maps = F.one_hot(torch.where(valid, label, 0), classes) * valid[..., None]
    maps = maps.permute(0, 3, 1, 2).float()
    size, stride, padding = field.size, field.stride, field.padding
    maps = F.max_pool2d(maps, (size, 1), (stride, 1), (padding, 0))
    return F.max_pool2d(maps, (1, size), (1, stride), (0, padding))


def _network_weights(setup: Setup, state: TrainState) -> Mapping[str, np.ndarray]:
    variables = {
        "params": state.params["student"],
        "batch_stats": state.batch_stats["student"],
    }
    return torch_state_dict(variables, setup.model)


def _load_head(head: Any, state: TrainState) -> None:
    """Copies the plug-in's parameters; fresh statistics are the same in both."""
    params = state.params[PLUGIN]

    def kernel(tree: Any) -> np.ndarray:
        return np.asarray(tree["kernel"]).transpose(3, 2, 0, 1)

    found = {
        "classifier.weight": kernel(params["classifier"]),
        "classifier.bias": np.asarray(params["classifier"]["bias"]),
    }
    for name, tree in params.get("project", {}).items():
        found[f"project.{name}.weight"] = kernel(tree)
    names = sorted(name for name in params if name.startswith("block"))
    for i, name in enumerate(names):
        found[f"blocks.{3 * i}.weight"] = kernel(params[name]["conv"])
        found[f"blocks.{3 * i + 1}.weight"] = np.asarray(params[name]["norm"]["scale"])
        found[f"blocks.{3 * i + 1}.bias"] = np.asarray(params[name]["norm"]["bias"])
    peer_network.load(head, found)
