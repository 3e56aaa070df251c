"""The layers of every network here: convolution and batch norm.

Both follow PyTorch's conventions, since the published networks and weights do. The
compute dtype is the dtype of the input. Parameters and statistics are float32 and are
cast where they are used.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from mpmc_jax import distributed
from mpmc_jax.models.convolution import (
    convolve,
    multiplies_halves,
    score,
)
from mpmc_jax.models.normalization import (
    Form,
    finish,
    fold,
    folds,
    normalize,
    normalize_by_batch,
    passes,
    per_channel,
)
from mpmc_jax.models.rematerialization import keep
from mpmc_jax.precision import at_least_float32

Array = jax.Array

# He et al., with the fan-out: the initialization of residual networks.
kaiming_normal_fan_out = initializers.variance_scaling(2.0, "fan_out", "normal")
# U(+-1/sqrt(fan_in)): PyTorch's default, the initialization of every head.
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")

BATCH_NORM_MOMENTUM = 0.1


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """One convolution as data: networks and receptive fields are built from it.

    Attributes:
      features: channels of the output.
      kernel: side of the square kernel.
      stride: positions between neighboring outputs.
      dilation: positions between neighboring taps of the kernel.
      zeros: zeros on each side; None for as many as keep the size at stride 1. A
        patch embedding has 0.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    zeros: int | None = None

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        if self.zeros is not None:
            return self.zeros
        return self.dilation * (self.kernel - 1) // 2


class Conv(nn.Module):
    """Square convolution, the same padding on all sides: (b,h,w,i) -> (b,h',w',o)."""

    spec: ConvSpec
    use_bias: bool = False
    kernel_init: initializers.Initializer = torch_uniform

    def __call__(self, x_bhwc: Array) -> Array:
        """Convolves in the dtype of the input."""
        return convolution(self.spec, x_bhwc, *self.parameters(x_bhwc.shape[-1]))

    @nn.compact
    def parameters(self, channels: int) -> tuple[Array, Array | None]:
        """Returns the kernel for `channels` input channels, and the bias if any."""
        spec = self.spec
        shape = (spec.kernel, spec.kernel, channels, spec.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if not self.use_bias:
            return kernel, None
        bias_init = symmetric_uniform((spec.kernel**2 * channels) ** -0.5)
        return kernel, self.param("bias", bias_init, (spec.features,), jnp.float32)


class Scores(Conv):
    """The last convolution of a network: its result is float32, or float64."""

    def __call__(self, x_bhwc: Array) -> Array:
        """Convolves in at least float32, or as `multiplies_halves` says."""
        kernel_kkio, bias_o = self.parameters(x_bhwc.shape[-1])
        if bias_o is None or not multiplies_halves(x_bhwc, kernel_kkio):
            return convolution(self.spec, at_least_float32(x_bhwc), kernel_kkio, bias_o)
        return keep(score(x_bhwc, kernel_kkio, bias_o))


def convolution(
    spec: ConvSpec, x_bhwc: Array, kernel_kkio: Array, bias_o: Array | None = None
) -> Array:
    """Applies a convolution with these parameters, in the dtype of the input."""
    out_bhwc = convolve(
        x_bhwc,
        kernel_kkio.astype(x_bhwc.dtype),
        stride=spec.stride,
        dilation=spec.dilation,
        padding=spec.padding,
    )
    if bias_o is not None:
        out_bhwc = out_bhwc + per_channel(bias_o.astype(x_bhwc.dtype))
    return keep(out_bhwc)


class BatchNorm(nn.Module):
    """Batch norm over (b,h,w), and what follows it at each position.

    Train mode uses the mean and variance of the batch over all devices. It updates the
    running statistics by 0.1 towards that mean and the *unbiased* variance. Statistics
    are computed in float32, or float64 for such input. A batch of several passes is
    normalized, and updates the running statistics, like the passes in a row.

    Attributes:
      axis_name: devices over which the batch is normalized, or None.
      slope: the activation's slope below zero: 0 for ReLU, None for no activation.
      scale_init: initializer of the scale.
    """

    axis_name: str | None = None
    slope: float | None = None
    scale_init: initializers.Initializer = initializers.ones

    def __call__(
        self, x_bhwc: Array, shortcut_bhwc: Array | None = None, *, train: bool
    ) -> Array:
        """Normalizes by the batch if `train`, else by the running statistics.

        The shortcut, if there is one, is added before the activation.

        Raises:
          ValueError: the batch holds one value per channel.
        """
        features = x_bhwc.shape[-1]
        scale, bias, mean, var = self._variables(features)
        if not train:
            out_bhwc = normalize(x_bhwc, mean.value, var.value, scale, bias)
            return finish(out_bhwc, shortcut_bhwc, self.slope)
        # Variables are made before anything is mapped over devices.
        axis_name = None if self.is_initializing() else self.axis_name
        form, parts = Form(axis_name, self.slope), passes()
        out_bhwc, means_pc, vars_pc = normalize_by_batch(
            form, x_bhwc, shortcut_bhwc, scale, bias, mean.value, parts
        )
        if not self.is_initializing():
            count = distributed.count(axis_name) * (x_bhwc.size // features // parts)
            if count == 1:
                raise ValueError(
                    "batch norm has one value per channel, which it would make 0: a "
                    "pass of a single image through image pooling; use a "
                    "train.batch_size (over all devices and train.accumulation) of at "
                    "least 2 images per pass"
                )
            unbiased_pc = vars_pc * (count / max(count - 1, 1))
            for i in range(parts):
                mean.value = _towards(mean.value, means_pc[i])
                var.value = _towards(var.value, unbiased_pc[i])
        return out_bhwc

    def folded(self, kernel_kkio: Array, bias_o: Array | None) -> tuple[Array, Array]:
        """Returns kernel and bias of the convolution before, with this norm in them.

        The norm is that of evaluation mode.
        """
        scale, bias, mean, var = self._variables(kernel_kkio.shape[-1])
        return fold(kernel_kkio, bias_o, mean.value, var.value, scale, bias)

    @nn.compact
    def _variables(
        self, features: int
    ) -> tuple[Array, Array, nn.Variable, nn.Variable]:
        """Returns scale, bias, running mean and running variance."""
        shape = (features,)
        return (
            self.param("scale", self.scale_init, shape, jnp.float32),
            self.param("bias", initializers.zeros, shape, jnp.float32),
            self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        )


class ConvNorm(nn.Module):
    """Convolution, batch norm and an activation: by default ReLU, see `BatchNorm`."""

    spec: ConvSpec
    axis_name: str | None = None
    use_bias: bool = False
    slope: float | None = 0.0
    kernel_init: initializers.Initializer = torch_uniform
    scale_init: initializers.Initializer = initializers.ones

    @nn.compact
    def __call__(
        self, x_bhwc: Array, shortcut_bhwc: Array | None = None, *, train: bool
    ) -> Array:
        """Maps (b,h,w,i) to (b,h',w',o); adds a shortcut before the activation."""
        conv = Conv(self.spec, self.use_bias, self.kernel_init, name="conv")
        norm = BatchNorm(self.axis_name, self.slope, self.scale_init, name="norm")
        if train or not folds():
            return norm(conv(x_bhwc), shortcut_bhwc, train=train)
        kernel_kkio, bias_o = norm.folded(*conv.parameters(x_bhwc.shape[-1]))
        out_bhwc = convolution(self.spec, x_bhwc, kernel_kkio, bias_o)
        return finish(out_bhwc, shortcut_bhwc, self.slope)


def element_dropout(keys_b: Array, x: Array, rate: float) -> Array:
    """Applies standard dropout: the elements that stay are scaled by 1 / (1 - rate).

    An example's mask depends on its key alone, not on its place in the batch.
    """
    shape = x.shape[1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys_b)
    return jnp.where(keep, x / (1 - rate), 0)


def check_dropout(masks: Iterable[str], valid: Iterable[str]) -> None:
    """Refuses masks of maps that a decoder does not have.

    Raises:
      ValueError: lists the valid names.
    """
    if not set(masks) <= set(valid):
        raise ValueError(f"dropout of {sorted(masks)}: valid are {sorted(valid)}")


def _towards(running: Array, value: Array) -> Array:
    value = (1 - BATCH_NORM_MOMENTUM) * running + BATCH_NORM_MOMENTUM * value
    return value.astype(running.dtype)


def symmetric_uniform(bound: float) -> initializers.Initializer:
    """Makes an initializer that draws from U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
