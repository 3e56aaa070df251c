"""Resizing as two matrix products, one per axis.

Most published networks interpolate with align_corners=True, which `jax.image.resize`
does not offer (it samples at half-pixel centers, as Segmenter and the published
resizing of position embeddings do). A product with a (out,in) matrix of few non-zeros
per row costs more arithmetic than a gather but is faster: its gradient is a product
too, whereas that of a gather is a scatter-add.
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
    """Resizes bilinearly so that corner pixels coincide: (b,h,w,c) -> (b,*size,c)."""
    _, height, width, _ = x_bhwc.shape
    if (height, width) == tuple(size):
        return x_bhwc
    if (height, width) == (1, 1):
        return jnp.broadcast_to(x_bhwc, (x_bhwc.shape[0], *size, x_bhwc.shape[3]))
    rows = interpolation_matrix(height, size[0])
    return resize_by(rows, interpolation_matrix(width, size[1]), x_bhwc)


def resize_half_pixel(x_bhwc: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly with half-pixel centers: (b,h,w,c) -> (b,*size,c)."""
    _, height, width, _ = x_bhwc.shape
    if (height, width) == tuple(size):
        return x_bhwc
    rows = half_pixel_matrix(height, size[0])
    return resize_by(rows, half_pixel_matrix(width, size[1]), x_bhwc)


def half_pixel_matrix(
    source: int, target: int, *, scale: float | None = None, cubic: bool = False
) -> np.ndarray:
    """Makes (target, source) float64 weights of interpolation at half-pixel centers.

    As in PyTorch without antialiasing: borders are repeated, and the cubic kernel has
    a = -0.75.

    Args:
      source: number of given positions.
      target: number of positions to compute.
      scale: targets per source for the coordinates; None for target / source.
      cubic: cubic interpolation instead of linear.
    """
    position = (np.arange(target) + 0.5) / (scale or target / source) - 0.5
    low = np.floor(position)
    matrix = np.zeros((target, source))
    for offset in range(-1, 3) if cubic else range(2):
        distance = np.abs(position - low - offset)
        weight = _cubic(distance) if cubic else 1 - distance
        index = np.clip(low + offset, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), index), weight)
    return matrix


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Computes the kernel of cubic convolution at distances 0 to 2 (Keys 1981)."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, far)


def resize_by(rows: np.ndarray, columns: np.ndarray, x_bhwc: Array) -> Array:
    """Multiplies both axes of a map by matrices (target, source), in its dtype.

    The products run at the highest precision, since rounded interpolation weights would
    shift logits.
    """
    rows_uh, columns_vw = (jnp.asarray(each, x_bhwc.dtype) for each in (rows, columns))
    # Columns first: the larger, second product then works on whole rows.
    highest = lax.Precision.HIGHEST
    x_bhwc = jnp.einsum("vw,bhwc->bhvc", columns_vw, x_bhwc, precision=highest)
    return jnp.einsum("uh,bhvc->buvc", rows_uh, x_bhwc, precision=highest)
