"""The description of a network as plain data."""

import dataclasses
from collections.abc import Collection

from mpmc_jax.models.rematerialization import REMATS

# Versions of a network, by the method whose authors published them.
VARIANTS = ("unimatch", "augseg", "u2pl", "ael")
DTYPES = ("float32", "bfloat16")
FROZEN = ("", "encoder")
ATTENTION = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The description of a segmenter, from which `models.registry` builds the network.

    Attributes:
      name: the decoder, a key of `registry.DECODERS`.
      backbone: the encoder, a key of `registry.ENCODERS`; ignored where the decoder has
        an encoder of its own.
      variant: which published version, one of `VARIANTS`.
      num_classes: number of classes, without void.
      in_channels: channels of the images.
      embedding: add a pixel-embedding head.
      auxiliary: add an auxiliary classifier on layer3 (U-Net: stage4).
      dtype: compute dtype; parameters and statistics are float32 always.
      width: every channel count is multiplied by width/64; a multiple of 4.
      remat: what the encoder's blocks recompute in the backward pass, for less memory
        and more time: "off", nothing; "cheap", all but the outputs of convolutions and
        dense layers; "all".
      image_size: side of the training crops, for encoders with parameters that depend
        on it (position embeddings).
      drop_path: share of the examples that skip a branch of a transformer's last block
        in train mode.
      attention: "xla", or "cudnn" for cuDNN's fused attention on GPUs, in bfloat16;
        other devices use XLA's in either case.
      freeze: "encoder" makes the encoder constant: it runs in evaluation mode, and no
        gradient is computed there; "" freezes nothing.

    Raises:
      ValueError: a value is not valid; the message lists the valid ones. The registry
        refuses unknown names of encoders and decoders.
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
    remat: str = "off"
    image_size: int = 224
    drop_path: float = 0.0
    attention: str = "xla"
    freeze: str = ""

    def __post_init__(self) -> None:
        _require("variant", self.variant, VARIANTS)
        _require("dtype", self.dtype, DTYPES)
        _require("attention", self.attention, ATTENTION)
        _require("remat", self.remat, REMATS)
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(
                f"model.attention='cudnn' computes in bfloat16, and the dtype is "
                f"{self.dtype!r}; set model.dtype (and model.teacher_dtype) to bfloat16"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path}: must be in [0, 1)")
        if self.freeze not in FROZEN:
            raise ValueError(f"model.freeze={self.freeze!r}: valid are {[*FROZEN]}")
        for field in ("num_classes", "in_channels", "width", "image_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be >= 1")
        if self.width % 4:
            raise ValueError(f"model.width={self.width}: must be a multiple of 4")


def _require(field: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise ValueError(f"model.{field}={value!r}: valid are {', '.join(valid)}")
