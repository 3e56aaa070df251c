"""One convolution, with a weight gradient that suits CPUs.

XLA writes the gradient of the kernel as a convolution whose window is the whole
picture, and on CPUs that runs at a tenth of the forward pass's rate. One matrix
product per kernel tap is 2 to 6 times faster there at the sizes trained here. Other
devices keep XLA's own gradient.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_platform: contextvars.ContextVar[str] = contextvars.ContextVar("platform")


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """What is traced within is for this platform, not for JAX's default one."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def convolve(
    x_bhwi: Array, kernel_kkio: Array, *, stride: int, dilation: int, padding: int
) -> Array:
    """(b,h,w,i), (k,k,i,o) -> (b,h',w',o), with `padding` zeros on every side."""
    if kernel_kkio.shape[0] == 1 and not padding:
        # One matrix product; on CPUs 1.4 to 5 times faster than a convolution.
        x_bhwi = x_bhwi[:, ::stride, ::stride]
        return lax.dot_general(x_bhwi, kernel_kkio[0, 0], (((3,), (0,)), ((), ())))
    platform = _platform.get(None) or jax.default_backend()
    form = _with_tap_gradient if platform == "cpu" else _convolution
    return form(stride, dilation, padding, x_bhwi, kernel_kkio)


def _convolution(
    stride: int, dilation: int, padding: int, x_bhwi: Array, kernel_kkio: Array
) -> Array:
    return lax.conv_general_dilated(
        x_bhwi,
        kernel_kkio,
        window_strides=(stride, stride),
        padding=((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_with_tap_gradient = jax.custom_vjp(_convolution, nondiff_argnums=(0, 1, 2))


def _forward(stride, dilation, padding, x_bhwi, kernel_kkio):
    y_bhwo = _convolution(stride, dilation, padding, x_bhwi, kernel_kkio)
    return y_bhwo, (x_bhwi, kernel_kkio)


def _backward(stride, dilation, padding, residuals, dy_bhwo):
    x_bhwi, kernel_kkio = residuals
    of_input = functools.partial(_convolution, stride, dilation, padding)
    transposed = jax.linear_transpose(lambda x: of_input(x, kernel_kkio), x_bhwi)
    (dx_bhwi,) = transposed(dy_bhwo)
    return dx_bhwi, _kernel_gradient(
        stride, dilation, padding, x_bhwi, dy_bhwo, size=kernel_kkio.shape[0]
    )


_with_tap_gradient.defvjp(_forward, _backward)


def _kernel_gradient(
    stride: int,
    dilation: int,
    padding: int,
    x_bhwi: Array,
    dy_bhwo: Array,
    *,
    size: int,
) -> Array:
    """(k,k,i,o): each tap is the product of its shifted input with dy."""
    batch, height, width, features = dy_bhwo.shape
    channels = x_bhwi.shape[-1]
    border = (padding, padding)
    x_bhwi = jnp.pad(x_bhwi, ((0, 0), border, border, (0, 0)))
    dy_no = dy_bhwo.reshape(-1, features)

    def tap(row: int, column: int) -> Array:
        shifted_bhwi = lax.slice(
            x_bhwi,
            (0, row, column, 0),
            (
                batch,
                row + (height - 1) * stride + 1,
                column + (width - 1) * stride + 1,
                channels,
            ),
            (1, stride, stride, 1),
        )
        return shifted_bhwi.reshape(-1, channels).T @ dy_no

    offsets = [tap_index * dilation for tap_index in range(size)]
    return jnp.stack(
        [jnp.stack([tap(row, column) for column in offsets]) for row in offsets]
    )
