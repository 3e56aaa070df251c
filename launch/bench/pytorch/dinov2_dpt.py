"""DINOv2 with UniMatch V2's DPT head in PyTorch: what `launch.bench` runs beside us.

Needs torch, which is not a requirement. Parameters have the published names, so weights
of a JAX run load without leftovers.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

import torch
from torch import nn
from torch.nn import functional as F

from mpmc_jax.models.decoders.dpt import Sizes, sizes
from mpmc_jax.models.encoders import vit


class _Scale(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if x.is_meta:
            # What `scaled_dot_product_attention` calls on a GPU in bfloat16.
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out = flash(q, k, v)[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class _Perceptron(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, features: int, heads: int, epsilon: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(features, epsilon)
        self.attn = _Attention(features, heads)
        self.ls1 = _Scale(features)
        self.norm2 = nn.LayerNorm(features, epsilon)
        self.mlp = _Perceptron(features)
        self.ls2 = _Scale(features)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, features: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, features, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class _Encoder(nn.Module):
    def __init__(self, spec: vit.Backbone, features: int):
        super().__init__()
        family = spec.family
        self.spec, grid = spec, family.grid or 0
        self.patch_embed = _Patches(features, family.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, features))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, features))
        blocks = [
            _Block(features, spec.heads, family.epsilon) for _ in range(spec.depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(features, family.epsilon)

    def forward(self, x):
        """The normed tokens (b,n,d) of the four levels."""
        size = [side // self.spec.family.patch for side in x.shape[2:]]
        tokens = self.patch_embed(x)
        first = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([first, tokens], 1) + self._positions(size)
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.spec.levels:
                found.append(self.norm(x)[:, 1:])
        return found, size

    def _positions(self, size):
        side, offset = self.spec.family.grid or 0, self.spec.family.offset or 0.0
        if size == [side, side]:
            return self.pos_embed
        square = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scales = [(n + offset) / side for n in size]
        resized = F.interpolate(square, scale_factor=scales, mode="bicubic")
        rest = resized.flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], rest], 1)


class _Unit(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _Fusion(nn.Module):
    def __init__(self, features: int, deepest: bool):
        super().__init__()
        if not deepest:
            self.resConfUnit1 = _Unit(features)
        self.resConfUnit2 = _Unit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, level, deeper, size):
        x = level if deeper is None else deeper + self.resConfUnit1(level)
        return self.out_conv(_resized(self.resConfUnit2(x), size))


class _Scratch(nn.Module):
    def __init__(self, channels: Sizes, classes: int):
        super().__init__()
        fused = channels.fused
        for i, inputs in enumerate(channels.levels, start=1):
            layer = nn.Conv2d(inputs, fused, 3, padding=1, bias=False)
            setattr(self, f"layer{i}_rn", layer)
            setattr(self, f"refinenet{i}", _Fusion(fused, deepest=i == 4))
        self.output_conv = nn.Sequential(
            nn.Conv2d(fused, fused, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(fused, classes, 1),
        )


class _Head(nn.Module):
    def __init__(self, features: int, channels: Sizes, classes: int):
        super().__init__()
        one, two, _, four = channels.levels
        self.projects = nn.ModuleList(
            nn.Conv2d(features, outputs, 1) for outputs in channels.levels
        )
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(one, one, 4, 4),
                nn.ConvTranspose2d(two, two, 2, 2),
                nn.Identity(),
                nn.Conv2d(four, four, 3, 2, 1),
            ]
        )
        self.scratch = _Scratch(channels, classes)

    def forward(self, levels, size):
        maps, scratch = [], self.scratch
        for i, tokens in enumerate(levels):
            square = tokens.transpose(1, 2).reshape(len(tokens), -1, *size)
            level = self.resize_layers[i](self.projects[i](square))
            maps.append(getattr(scratch, f"layer{i + 1}_rn")(level))
        path = None
        for i in (3, 2, 1, 0):
            target = maps[i - 1].shape[2:] if i else [2 * n for n in maps[0].shape[2:]]
            path = getattr(scratch, f"refinenet{i + 1}")(maps[i], path, target)
        return scratch.output_conv(path)


class Segmenter(nn.Module):
    """A DINOv2 backbone and the DPT head."""

    def __init__(self, backbone: str, classes: int, width: int = 64):
        super().__init__()
        spec = vit.BACKBONES[backbone]
        features = spec.heads * width
        self.backbone = _Encoder(spec, features)
        self.head = _Head(features, sizes(features, width), classes)

    def forward(self, x, mask=None):
        """Logits of the images' size; `mask` (b,1,d) multiplies all levels."""
        levels, size = self.backbone(x)
        if mask is not None:
            levels = [level * mask for level in levels]
        return _resized(self.head(levels, size), x.shape[2:])


def _resized(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)
