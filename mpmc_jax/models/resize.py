"""Align-corners bilinear resizing, as two matrix products.

The published networks interpolate with align_corners=True, which `jax.image.resize`
does not offer (it samples at half-pixel centers). A product with a (out,in) matrix of
two non-zeros per row costs more arithmetic than a gather but is faster: its gradient
is a product too, whereas that of a gather is a scatter-add.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Makes (target, source) float64 weights of align-corners linear interpolation."""
    matrix = np.zeros((target, source))
    step = (source - 1) / (target - 1) if target > 1 else 0.0
    position = np.arange(target) * step
    low = np.clip(np.floor(position).astype(int), 0, max(source - 2, 0))
    high = np.minimum(low + 1, source - 1)
    fraction = position - low
    rows = np.arange(target)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def resize_align_corners(x_bhwc: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly so that corner pixels coincide: (b,h,w,c) -> (b,*size,c).

    Weights and result are in the input's dtype; the products run at the highest
    precision, since rounded interpolation weights would shift logits.
    """
    _, height, width, _ = x_bhwc.shape
    if (height, width) == tuple(size):
        return x_bhwc
    if (height, width) == (1, 1):
        return jnp.broadcast_to(x_bhwc, (x_bhwc.shape[0], *size, x_bhwc.shape[3]))
    rows = jnp.asarray(interpolation_matrix(height, size[0]), x_bhwc.dtype)
    columns = jnp.asarray(interpolation_matrix(width, size[1]), x_bhwc.dtype)
    # Columns first: the larger, second product then works on whole rows.
    highest = lax.Precision.HIGHEST
    x_bhwc = jnp.einsum("vw,bhwc->bhvc", columns, x_bhwc, precision=highest)
    return jnp.einsum("uh,bhvc->buvc", rows, x_bhwc, precision=highest)
