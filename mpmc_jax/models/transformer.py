"""The blocks of vision transformers, and their layers, for encoders and decoders."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from mpmc_jax.models import layers
from mpmc_jax.models.platform import target_platform
from mpmc_jax.models.rematerialization import keep
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import PyTree

Array = jax.Array

# The initialization of every dense layer, token and position.
small_normal = initializers.normal(0.02)

# Sums of more tokens than this are parted.
_LONGEST_SUM = 256
# GPUs multiply by so many rows at once. XLA pads matrices with others anew, each time
# that a product reads them.
_ROWS = 8


class LayerNorm(nn.Module):
    """Layer norm over the channels of tokens (b,n,d), in at least float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x_bnd: Array) -> Array:
        """Normalizes; the result has the dtype of the input."""
        shape = x_bnd.shape[-1:]
        scale_d = self.param("scale", initializers.ones, shape, jnp.float32)
        bias_d = self.param("bias", initializers.zeros, shape, jnp.float32)
        return layer_norm(self.epsilon, x_bnd, scale_d, bias_d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(epsilon: float, x_bnd: Array, scale_d: Array, bias_d: Array) -> Array:
    """Normalizes channels, then multiplies by the scale and adds the bias.

    Its gradient is computed from the input and two numbers per token, so that nothing
    else of the input's size is kept.
    """
    return _layer_norm_forward(epsilon, x_bnd, scale_d, bias_d)[0]


def _layer_norm_forward(epsilon, x_bnd, scale_d, bias_d):
    wide_bnd = at_least_float32(x_bnd)
    mean_bn1 = jnp.mean(wide_bnd, axis=-1, keepdims=True)
    var_bn1 = jnp.mean(jnp.square(wide_bnd - mean_bn1), axis=-1, keepdims=True)
    inverse_bn1 = lax.rsqrt(var_bn1 + epsilon)
    out_bnd = (wide_bnd - mean_bn1) * inverse_bn1 * scale_d[None, None]
    out_bnd = (out_bnd + bias_d[None, None]).astype(x_bnd.dtype)
    return out_bnd, (x_bnd, scale_d, bias_d, mean_bn1, inverse_bn1)


def _layer_norm_backward(epsilon, residuals, dy_bnd):
    del epsilon
    x_bnd, scale_d, bias_d, mean_bn1, inverse_bn1 = residuals
    wide_bnd = at_least_float32(dy_bnd)
    normal_bnd = (at_least_float32(x_bnd) - mean_bn1) * inverse_bn1
    scaled_bnd = wide_bnd * scale_d[None, None]
    dx_bnd = inverse_bn1 * (
        scaled_bnd
        - jnp.mean(scaled_bnd, axis=-1, keepdims=True)
        - normal_bnd * jnp.mean(scaled_bnd * normal_bnd, axis=-1, keepdims=True)
    )
    dscale_d, dbias_d = _parameter_gradients(x_bnd, dy_bnd, mean_bn1, inverse_bn1)
    return (
        dx_bnd.astype(x_bnd.dtype),
        dscale_d.astype(scale_d.dtype),
        dbias_d.astype(bias_d.dtype),
    )


def _parameter_gradients(x_bnd, dy_bnd, mean_bn1, inverse_bn1):
    """Sums the gradients of scale and bias.

    On GPUs that is a single reduction, which computes what it sums: the compiler would
    write the products, as part of the input's gradient.
    """
    gpu = target_platform() == "gpu"
    if gpu:
        x_bnd, dy_bnd = lax.optimization_barrier((x_bnd, dy_bnd))
    wide_bnd = at_least_float32(dy_bnd)
    normal_bnd = (at_least_float32(x_bnd) - mean_bn1) * inverse_bn1
    if not gpu:
        return jnp.sum(wide_bnd * normal_bnd, axis=(0, 1)), jnp.sum(wide_bnd, (0, 1))
    # XLA parts longer sums, and would write what it sums.
    tokens, features = x_bnd.shape[0] * x_bnd.shape[1], x_bnd.shape[2]
    rows = max(n for n in range(1, _LONGEST_SUM) if tokens % n == 0)
    sums = tuple(
        each.reshape(-1, rows, features) for each in (wide_bnd * normal_bnd, wide_bnd)
    )
    zero = jnp.zeros((), wide_bnd.dtype)
    for axis in (1, 0):
        sums = lax.reduce(
            sums,
            (zero, zero),
            lambda sums, values: (sums[0] + values[0], sums[1] + values[1]),
            (axis,),
        )
    return sums


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Multiplies by the normal distribution's function, exactly.

    Its gradient is computed from the input, so that nothing else is kept.
    """
    wide = at_least_float32(x)
    return (wide * _normal_distribution(wide)).astype(x.dtype)


def _gelu_backward(x, dy):
    wide = at_least_float32(x)
    density = jnp.exp(-jnp.square(wide) / 2) * (2 * np.pi) ** -0.5
    slope = _normal_distribution(wide) + wide * density
    dx = (at_least_float32(dy) * slope).astype(x.dtype)
    # GPUs write it for products, and need not compute it again for other readers.
    return (lax.optimization_barrier(dx) if target_platform() == "gpu" else dx,)


def _normal_distribution(x: Array) -> Array:
    return (1 + lax.erf(x * 2**-0.5)) / 2


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


# (array, place in the block) -> the array with elements dropped.
_Drop = Callable[[Array, int], Array]


class Block(nn.Module):
    """A pre-norm block: x += attention(norm(x)), then x += mlp(norm(x)).

    Attributes:
      heads: attention heads.
      epsilon: epsilon of layer norm.
      layer_scale: whether a learned vector multiplies each branch.
      attention: implementation of the attention, see `ModelConfig.attention`.
      dropout: share of the elements that are dropped, given keys: of the attention's
        weights, of both branches and of the inner layer.
    """

    heads: int
    epsilon: float
    layer_scale: bool = False
    attention: str = "xla"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_bnd: Array,
        branch_scale_b2: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """Maps tokens (b,n,d) to (b,n,d).

        `branch_scale_b2` multiplies the two branches of each example (drop path), and
        `dropout_keys` are (b,) keys or None.
        """
        batch, count, _ = x_bnd.shape
        size = batch, count
        # Keys draw for each example.
        joined = _needs_rows(size) and dropout_keys is None
        if joined:
            x_bnd = _join(x_bnd)
        drop = self._drop(dropout_keys)
        attention = functools.partial(self._attend, size=size)
        for i, branch in enumerate((attention, self._perceive)):
            norm = LayerNorm(self.epsilon, name=f"norm{i + 1}")
            scale_d = None
            if self.layer_scale:
                shape = x_bnd.shape[-1:]
                scale_d = self.param(
                    f"scale{i + 1}", initializers.ones, shape, jnp.float32
                )
            out_bnd = drop(branch(norm(x_bnd), scale_d, drop), i)
            if branch_scale_b2 is not None:
                scale = branch_scale_b2[:, i, None, None].astype(out_bnd.dtype)
                if joined:
                    scale = _join(jnp.broadcast_to(scale, (*size, 1)))
                out_bnd = out_bnd * scale
            # Within the product, XLA would add to a copy; within the norm, it would
            # read the sum again.
            x_bnd = _apart(x_bnd + _apart(out_bnd))
        return _part(x_bnd, size)

    def _drop(self, keys_b: Array | None) -> _Drop:
        """Makes the function that drops elements at one of four places."""

        def drop(x: Array, place: int) -> Array:
            if keys_b is None:
                return x
            fold = jax.vmap(lambda key: jax.random.fold_in(key, place))
            return layers.element_dropout(fold(keys_b), x, self.dropout)

        return drop

    def _attend(
        self,
        x_bnd: Array,
        scale_d: Array | None,
        drop: _Drop,
        size: tuple[int, int],
    ) -> Array:
        """Attends among the tokens (*size,d) of each example, joined or not."""
        features = x_bnd.shape[-1]
        # The fused attention cannot drop weights.
        implementation = "xla" if self.dropout else self.attention
        inputs = Dense(3 * features, name="qkv")
        # cuDNN reads three arrays, which would be copied out of one.
        if _fuses_attention(implementation):
            qkv = inputs.in_parts(x_bnd, 3)
        else:
            qkv = jnp.split(inputs(x_bnd), 3, axis=-1)
        heads = (*size, self.heads, features // self.heads)
        q_bnhd, k_bnhd, v_bnhd = (_part(each, size).reshape(heads) for each in qkv)
        out_bnhd = attend(
            q_bnhd, k_bnhd, v_bnhd, implementation, lambda weights: drop(weights, 2)
        )
        out_bnd = out_bnhd.reshape(*size, features)
        if x_bnd.shape[:2] != size:
            out_bnd = _join(out_bnd)
        return Dense(features, name="proj")(out_bnd, scale_d)

    def _perceive(self, x_bnd: Array, scale_d: Array | None, drop: _Drop) -> Array:
        features = x_bnd.shape[-1]
        inner = gelu(Dense(4 * features, name="fc1")(x_bnd))
        return Dense(features, name="fc2")(drop(inner, 3), scale_d)


class Dense(nn.Module):
    """A dense layer, in the dtype of its input."""

    features: int

    def __call__(self, x_bnd: Array, scale_d: Array | None = None) -> Array:
        """Maps (b,n,d) to (b,n,features).

        `scale_d` multiplies the result. It is multiplied into the parameters, so that
        no gradient of a map is read for its sake.
        """
        kernel, bias = self._parameters(x_bnd.shape[-1])
        if scale_d is not None:
            kernel, bias = kernel * scale_d[None], bias * scale_d
        return keep(_affine(x_bnd, kernel, bias))

    def in_parts(self, x_bnd: Array, count: int) -> list[Array]:
        """Returns equal parts of the result, each as a product of its own."""
        kernel, bias = self._parameters(x_bnd.shape[-1])
        return list(map(keep, _in_parts(count, x_bnd, kernel, bias)))

    @nn.compact
    def _parameters(self, channels: int) -> tuple[Array, Array]:
        shape = (channels, self.features)
        kernel = self.param("kernel", small_normal, shape, jnp.float32)
        return kernel, self.param("bias", initializers.zeros, shape[1:], jnp.float32)


def _needs_rows(size: tuple[int, int]) -> bool:
    """Whether tokens (b,n) are padded for products."""
    return target_platform() == "gpu" and size[0] * size[1] % _ROWS != 0


def _join(x_bnd: Array) -> Array:
    """Joins the examples' tokens, and appends zeros: (b,n,d) -> (1,n',d)."""
    joined_1nd = x_bnd.reshape(1, -1, x_bnd.shape[-1])
    return jnp.pad(joined_1nd, ((0, 0), (0, -joined_1nd.shape[1] % _ROWS), (0, 0)))


def _part(x_bnd: Array, size: tuple[int, int]) -> Array:
    """Undoes `_join`, if the tokens were joined: to (*size,d)."""
    if x_bnd.shape[:2] == size:
        return x_bnd
    return x_bnd[:, : size[0] * size[1]].reshape(*size, -1)


def _affine(x_bnd: Array, kernel: Array, bias: Array) -> Array:
    kernel, bias = kernel.astype(x_bnd.dtype), bias.astype(x_bnd.dtype)
    # XLA would join products that have an array in common, and copy the others.
    x_bnd, kernel = _apart((x_bnd, kernel))
    return jnp.dot(x_bnd, kernel) + bias[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(count: int, x_bnd: Array, kernel: Array, bias: Array) -> list[Array]:
    kernels = jnp.split(kernel.astype(x_bnd.dtype), count, axis=1)
    parts = zip(kernels, jnp.split(bias, count), strict=True)
    return [_affine(x_bnd, *part) for part in parts]


def _in_parts_backward(count, given, cotangents):
    """The gradient, as that of a single product."""
    del count
    _, pull_back = jax.vjp(_affine, *given)
    return pull_back(jnp.concatenate(cotangents, axis=-1))


_in_parts.defvjp(
    lambda count, *given: (_in_parts(count, *given), given), _in_parts_backward
)


@jax.custom_vjp
def _apart(x: PyTree) -> PyTree:
    """Returns the arrays; on GPUs, nothing is joined across, except in gradients."""
    return lax.optimization_barrier(x) if target_platform() == "gpu" else x


_apart.defvjp(lambda x: (_apart(x), None), lambda residuals, dy: (dy,))


def attend(
    q_bnhd: Array,
    k_bnhd: Array,
    v_bnhd: Array,
    implementation: str,
    drop: Callable[[Array], Array],
) -> Array:
    """Scaled dot-product attention, its softmax in at least float32.

    `drop` acts on the weights, and only in XLA's implementation.

    cuDNN's is used only where there is a GPU, because runs are predicted elsewhere too.
    JAX's own function rounds a float64 softmax to float32, so XLA's is written here.
    """
    if _fuses_attention(implementation):
        return jax.nn.dot_product_attention(
            q_bnhd, k_bnhd, v_bnhd, implementation="cudnn"
        )
    wide = jnp.promote_types(q_bnhd.dtype, jnp.float32)
    logits_bhnm = jnp.einsum(
        "bnhd,bmhd->bhnm", q_bnhd, k_bnhd, preferred_element_type=wide
    )
    weights_bhnm = drop(jax.nn.softmax(logits_bhnm * q_bnhd.shape[-1] ** -0.5))
    return jnp.einsum("bhnm,bmhd->bnhd", weights_bhnm.astype(v_bnhd.dtype), v_bnhd)


def _fuses_attention(implementation: str) -> bool:
    return implementation == "cudnn" and target_platform() == "gpu"
