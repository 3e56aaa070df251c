"""UniMatch's DeepLabV3+ and MPMC's head in PyTorch: what `launch.bench` runs beside us.

Needs torch, which is not a requirement; only `launch.bench.pytorch.step` imports it.
Parameters have the published names, so weights of a JAX run load without leftovers.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
_WINDOWS = (1, 7, 19)
_WIDTHS = {"paper": (256, 128, 64), "lite": (64, 64, 64)}


def _conv_norm(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1):
    padding = dilation * (kernel // 2)
    return (
        nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inner)
        self.downsample = None
        if stride > 1 or inputs != 4 * inner:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False),
                nn.BatchNorm2d(4 * inner),
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut, inplace=True)


class _ResNet(nn.Module):
    """Deep stem, output stride 16, layer4 dilated by 1, 2, 2."""

    def __init__(self, backbone: str, width: int):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *_conv_norm(width, width, 3),
            nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(2 * width)
        channels = 2 * width
        for index, depth in enumerate(_DEPTHS[backbone]):
            stride = (1, 2, 2, 1)[index]
            blocks = []
            for i in range(depth):
                dilation = 2 if index == 3 and i else 1
                first = stride if i == 0 else 1
                blocks.append(_Bottleneck(channels, width << index, first, dilation))
                channels = 4 * (width << index)
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))

    def low(self, x):
        """Up to layer1."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer1(F.max_pool2d(x, 3, 2, 1))

    def high(self, low):
        """From layer1 to layer4."""
        return self.layer4(self.layer3(self.layer2(low)))


class _Pooled(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_norm(inputs, outputs))

    def forward(self, x):
        return self.gap(x).expand(-1, -1, *x.shape[2:])


class _Context(nn.Module):
    """ASPP at rates 6, 12 and 18."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.b0 = nn.Sequential(*_conv_norm(inputs, outputs))
        for i, rate in enumerate((6, 12, 18), start=1):
            branch = nn.Sequential(*_conv_norm(inputs, outputs, 3, rate))
            setattr(self, f"b{i}", branch)
        self.b4 = _Pooled(inputs, outputs)
        self.project = nn.Sequential(*_conv_norm(5 * outputs, outputs))

    def forward(self, x):
        branches = [self.b0, self.b1, self.b2, self.b3, self.b4]
        return self.project(torch.cat([branch(x) for branch in branches], 1))


class Segmenter(nn.Module):
    """DeepLabV3+ as UniMatch has it; `width` is 64 as published."""

    def __init__(self, backbone: str, classes: int, width: int = 64):
        super().__init__()
        features = 4 * width
        self.backbone = _ResNet(backbone, width)
        self.head = _Context(32 * width, features)
        low = 48 * width // 64
        self.reduce = nn.Sequential(*_conv_norm(features, low))
        self.fuse = nn.Sequential(
            *_conv_norm(features + low, features, 3), *_conv_norm(features, features, 3)
        )
        self.classifier = nn.Conv2d(features, classes, 1)

    def decode(self, low, high, size):
        """layer1 and layer4 -> logits of the image's size."""
        context = _resized(self.head(high), low.shape[2:])
        fused = self.fuse(torch.cat([self.reduce(low), context], 1))
        return _resized(self.classifier(fused), size)

    def forward(self, x, masks=None):
        """Logits, those of the perturbed features if there are masks, and layer1."""
        low = self.backbone.low(x)
        high = self.backbone.high(low)
        if masks is None:
            return self.decode(low, high, x.shape[2:]), None, low
        both_low = torch.cat([low, low * masks[0]])
        both_high = torch.cat([high, high * masks[1]])
        clean, perturbed = self.decode(both_low, both_high, x.shape[2:]).chunk(2)
        return clean, perturbed, low


class PatchHead(nn.Module):
    """MPMC's patch classifier on layer1, "paper" or "lite"."""

    def __init__(self, head: str, channels: int, classes: int):
        super().__init__()
        self.project = nn.ModuleDict()
        inputs = channels * len(_WINDOWS)
        if head == "lite":
            for window in _WINDOWS:
                convolution = nn.Conv2d(channels, 64, 1, bias=False)
                self.project[f"window{window}"] = convolution
            inputs = 64
        blocks = []
        for width in _WIDTHS[head]:
            for kernel in (3, 3, 1):
                blocks += _conv_norm(inputs, width, kernel)
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(inputs, classes, 1)

    def forward(self, z):
        if self.project:
            scales = [
                _pooled(self.project[f"window{window}"](z), window)
                for window in _WINDOWS
            ]
            x = scales[0] + scales[1] + scales[2]
        else:
            x = torch.cat([_pooled(z, window) for window in _WINDOWS], 1)
        return self.classifier(self.blocks(x))


def load(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Loads every parameter; fresh statistics may stay.

    Raises:
      ValueError: a parameter is missing, or one has no place.
    """
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
    missing, unknown = module.load_state_dict(tensors, strict=False)
    missing = set(missing) & {name for name, _ in module.named_parameters()}
    if missing or unknown:
        raise ValueError(f"PyTorch's network differs: {sorted({*missing, *unknown})}")


def _resized(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _pooled(z, window: int):
    """Zero padding counts. Two one-dimensional means, as ours."""
    if window == 1:
        return z
    z = F.avg_pool2d(z, (window, 1), 1, (window // 2, 0))
    return F.avg_pool2d(z, (1, window), 1, (0, window // 2))
