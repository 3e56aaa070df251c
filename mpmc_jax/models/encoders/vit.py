"""Vision transformers: augreg's ViT/16 as in Segmenter, and DINOv2's ViT/14.

Sources: segm/model/vit.py and blocks.py of Segmenter (Strudel et al. 2021), whose
weights are augreg's (Steiner et al. 2021); dinov2/models/vision_transformer.py (Oquab
et al. 2023). Every block is a tap: its tokens after the final norm, as a map without
the class token. There is no batch norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.interface import Encoder, FeatureMap, Tap, check_crop
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.rematerialization import rematerialized
from mpmc_jax.models.resize import half_pixel_matrix, resize_by
from mpmc_jax.models.transformer import Block, LayerNorm, small_normal

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the published families differ.

    Attributes:
      patch: side of a patch in pixels.
      epsilon: epsilon of layer norm.
      layer_scale: whether a learned vector multiplies each branch of a block.
      grid: rows of the position embeddings; None for those of the training crop.
      offset: what is added to the rows of a resized grid before the scale is computed;
        None resizes bilinearly instead of bicubically.
      normalization: a key of `pixels.NORMALIZATIONS`.
    """

    patch: int
    epsilon: float
    layer_scale: bool
    grid: int | None
    offset: float | None
    normalization: str


AUGREG = Family(
    patch=16,
    # Segmenter's; the pretraining had 1e-6.
    epsilon=1e-5,
    layer_scale=False,
    grid=None,
    offset=None,
    normalization="half",
)
DINOV2 = Family(
    patch=14,
    epsilon=1e-6,
    layer_scale=True,
    grid=37,
    offset=0.1,
    normalization="imagenet",
)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The size of one backbone.

    Attributes:
      family: the published family.
      heads: attention heads; each has `ModelConfig.width` channels, 64 as published.
      depth: number of blocks.
      levels: the four blocks that decoders of several levels read.
    """

    family: Family
    heads: int
    depth: int
    levels: tuple[int, int, int, int]


_SIZES = {
    # For trials on small machines; no weights were published.
    "xs": (3, 4, (0, 1, 2, 3)),
    "s": (6, 12, (2, 5, 8, 11)),
    "b": (12, 12, (2, 5, 8, 11)),
    "l": (16, 24, (4, 11, 17, 23)),
}
BACKBONES = {
    **{f"vit_{name}16": Backbone(AUGREG, *size) for name, size in _SIZES.items()},
    **{f"dinov2_{name}14": Backbone(DINOV2, *size) for name, size in _SIZES.items()},
}


def build(config: ModelConfig, axis_name: str | None) -> Encoder:
    """Builds the transformer `config.backbone`.

    Raises:
      ValueError: the training crop is no multiple of the patch.
    """
    del axis_name
    spec = BACKBONES[config.backbone]
    family, features = spec.family, spec.heads * config.width
    patch = ConvSpec(features, family.patch, family.patch, zeros=0)
    check_crop(
        config.image_size,
        family.patch,
        f"{config.backbone} needs a multiple of its patch of {family.patch} pixels",
    )
    return Encoder(
        ViT(
            spec=spec,
            width=config.width,
            grid=family.grid or config.image_size // family.patch,
            drop_path=config.drop_path,
            attention=config.attention,
            remat=config.remat,
        ),
        taps={tap_name(i): Tap(features, (patch,)) for i in range(spec.depth)},
        default_tap=tap_name(spec.levels[0]),
        first_kernel=("embed", "kernel"),
        maps=_maps(spec, features, config.in_channels),
        multiple=family.patch,
        has_dropout=config.drop_path > 0,
        levels=tuple(map(tap_name, spec.levels)),
        resizes_images=True,
        normalization=family.normalization,
        adapters={} if family.grid else {("position",): adapt_position},
    )


def tap_name(block: int) -> str:
    """Names the tap of a block."""
    return f"block{block}"


def _maps(spec: Backbone, features: int, in_channels: int) -> tuple[FeatureMap, ...]:
    """Lists the outputs of the dense layers."""
    stride = spec.family.patch
    block = tuple(
        FeatureMap(outputs * features, stride, inputs * outputs * features**2)
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1))
    )
    embed = FeatureMap(features, stride, stride**2 * in_channels * features)
    return (embed, *block * spec.depth)


class PatchEmbedding(nn.Module):
    """A convolution of non-overlapping patches, as one product."""

    features: int
    patch: int

    @nn.compact
    def __call__(self, images_bhwc: Array) -> Array:
        """Maps (b,h*p,w*p,c) to (b,h,w,features)."""
        batch, rows, columns, channels = images_bhwc.shape
        side, dtype = self.patch, images_bhwc.dtype
        shape = (side, side, channels, self.features)
        kernel = self.param("kernel", layers.torch_uniform, shape, jnp.float32)
        bound = (side**2 * channels) ** -0.5
        bias_init = layers.symmetric_uniform(bound)
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        split = (batch, rows // side, side, columns // side, side, channels)
        out_bhwd = jnp.einsum(
            "bhpwqc,pqcd->bhwd", images_bhwc.reshape(split), kernel.astype(dtype)
        )
        return out_bhwd + bias[None, None, None].astype(dtype)


class ViT(nn.Module):
    """The encoder: maps images to the normalized tokens of its blocks.

    Attributes:
      spec: the backbone.
      width: channels per attention head.
      grid: rows and columns of the position embeddings.
      drop_path: share of the examples that skip a branch of the last block in train
        mode; earlier blocks drop in proportion to their depth.
      attention: implementation of the attention.
      remat: what blocks recompute in the backward pass, see `ModelConfig.remat`.
    """

    spec: Backbone
    width: int
    grid: int
    drop_path: float = 0.0
    attention: str = "xla"
    remat: str = "off"

    @nn.compact
    def __call__(
        self,
        images_bhwc: Array,
        *,
        until: str | None,
        train: bool,
        dropout_keys: Array | None = None,
    ) -> dict[str, Array]:
        """Runs the blocks up to `until`; `dropout_keys` are (b,) keys or None."""
        del train  # Nothing but the drop path differs, and that needs keys.
        spec, family = self.spec, self.spec.family
        block_cls = Block
        if not self.is_initializing():
            block_cls = nn.jit(block_cls)  # Equal blocks are traced once.
        block_cls = rematerialized(block_cls, self.remat)
        norm = LayerNorm(family.epsilon, name="norm")
        x_bnd, size = self._embed(images_bhwc)
        scales = self._branch_scales(dropout_keys)
        taps = {}
        for i in range(spec.depth):
            block = block_cls(
                spec.heads,
                family.epsilon,
                family.layer_scale,
                self.attention,
                name=tap_name(i),
            )
            x_bnd = block(x_bnd, None if scales is None else scales[:, i])
            patches_bnd = norm(x_bnd)[:, 1:]
            shape = (x_bnd.shape[0], *size, x_bnd.shape[-1])
            taps[tap_name(i)] = patches_bnd.reshape(shape)
            if tap_name(i) == until:
                break
        return taps

    def _embed(self, images_bhwc: Array) -> tuple[Array, tuple[int, int]]:
        """Returns the tokens, the class token first, and rows and columns of patches.

        The class token has the first position.
        """
        family, features = self.spec.family, self.spec.heads * self.width
        embed = PatchEmbedding(features, family.patch, name="embed")
        patches_bhwd = embed(images_bhwc)
        batch, rows, columns, _ = patches_bhwd.shape
        token = self.param("class_token", small_normal, (1, 1, features), jnp.float32)
        shape = (1, 1 + self.grid**2, features)
        position = self.param("position", small_normal, shape, jnp.float32)
        position = resize_position(position, (rows, columns), family.offset)
        first = jnp.broadcast_to(token, (batch, 1, features)).astype(images_bhwc.dtype)
        patches_bnd = patches_bhwd.reshape(batch, rows * columns, features)
        x_bnd = jnp.concatenate([first, patches_bnd], axis=1)
        return x_bnd + position.astype(x_bnd.dtype), (rows, columns)

    def _branch_scales(self, keys_b: Array | None) -> Array | None:
        """Draws the multipliers (b,depth,2) of the branches: 0 or 1 / (1 - rate)."""
        if keys_b is None or not self.drop_path:
            return None
        depth = self.spec.depth

        def draw(key: Array) -> Array:
            # The keys themselves are the decoder's.
            return jax.random.uniform(jax.random.fold_in(key, 0), (depth, 2))

        keep = 1 - jnp.linspace(0, self.drop_path, depth)[None, :, None]
        return (jax.vmap(draw)(keys_b) < keep) / keep


def resize_position(
    position: Array, size: tuple[int, int], offset: float | None
) -> Array:
    """Resizes position embeddings (1,1+g*g,d) to (1,1+h*w,d); the first one stays.

    With an offset as published for DINOv2: PyTorch's bicubic interpolation, whose
    coordinates are computed with the scale (h + offset) / g. Without one: bilinear, as
    in Segmenter (which does not resize a grid of another shape with as many patches).
    """
    first, grid = position[:, :1], position[:, 1:]
    side = grid_side(position.shape[1])
    if (side, side) == size:
        return position
    rows, columns = (
        half_pixel_matrix(side, n)
        if offset is None
        else half_pixel_matrix(side, n, scale=(n + offset) / side, cubic=True)
        for n in size
    )
    features = position.shape[-1]
    resized = resize_by(rows, columns, grid.reshape(1, side, side, features))
    return jnp.concatenate([first, resized.reshape(1, -1, features)], axis=1)


def adapt_position(position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resizes stored position embeddings to those of another crop, of this shape."""
    side = grid_side(shape[1])
    return np.asarray(resize_position(jnp.asarray(position), (side, side), None))


def grid_side(count: int) -> int:
    """Returns the rows of a square grid, of a number of tokens with the class token.

    Raises:
      ValueError: the grid is not square.
    """
    side = round((count - 1) ** 0.5)
    if side < 1 or side**2 != count - 1:
        raise ValueError(
            f"{count} position embeddings are not those of a class token and a square "
            "grid of patches"
        )
    return side
