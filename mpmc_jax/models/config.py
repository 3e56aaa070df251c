"""What a network is, as plain data."""

import dataclasses
from collections.abc import Collection

from mpmc_jax.models.decoders.aspp import VARIANTS
from mpmc_jax.models.encoders.resnet import BACKBONES

NAMES = ("deeplabv3plus", "unet")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A segmenter's description; the registries of `models.build` turn it into one.

    Attributes:
      name: the architecture.
      backbone: DeepLabV3+'s encoder, a key of `resnet.BACKBONES`.
      variant: whose version of it, a key of `decoder.VARIANTS`.
      num_classes: classes, void not counted.
      in_channels: channels of the images.
      embedding: add a pixel-embedding head.
      auxiliary: add an auxiliary classifier on layer3 (U-Net: stage4).
      dtype: compute dtype; parameters and statistics are float32 always.
      width: scales every channel count by width/64; a multiple of 4.
      remat: recompute the encoder's blocks in the backward pass: less memory, more
        time.

    Raises:
      ValueError: a value is not valid; the message lists those that are.
    """

    name: str = "deeplabv3plus"
    backbone: str = "resnet50"
    variant: str = "unimatch"
    num_classes: int = 21
    in_channels: int = 3
    embedding: bool = False
    auxiliary: bool = False
    dtype: str = "float32"
    width: int = 64
    remat: bool = False

    def __post_init__(self) -> None:
        _require("name", self.name, NAMES)
        if self.name == "deeplabv3plus":
            _require("backbone", self.backbone, BACKBONES)
            _require("variant", self.variant, VARIANTS)
        _require("dtype", self.dtype, DTYPES)
        for field in ("num_classes", "in_channels", "width"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be >= 1")
        if self.width % 4:
            raise ValueError(f"model.width={self.width}: must be a multiple of 4")

    @property
    def title(self) -> str:
        """Architecture and what it is built of, for messages."""
        if self.name == "deeplabv3plus":
            return f"{self.name}/{self.backbone}, variant {self.variant}"
        return self.name


def _require(field: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise ValueError(f"model.{field}={value!r}: valid are {', '.join(valid)}")
