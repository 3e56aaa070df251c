"""UniMatch's geometry for ACDC, against its definition."""

import numpy as np

from mpmc_jax.data.geometry import registry as geometries
from mpmc_jax.data.geometry.acdc import Rotation
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.pixels import PixelFormat


def test_turns_are_those_of_the_published_loader():
    rng = np.random.default_rng(9)
    image = rng.random((20, 30, 1)).astype(np.float32)
    label = rng.integers(0, 4, (20, 30), dtype=np.uint8)
    pixels = PixelFormat(1, (0.0,), (1.0,), "float32", high=(1.0,))
    config = CropConfig(24)
    kinds = {"turned": 0, "rotated": 0, "as it is": 0}
    seen = set()
    for _ in range(2000):
        turn = geometries.draw_acdc(rng, (20, 30), config)
        assert isinstance(turn, Rotation)
        rotated = "rotated" if turn.degrees else "as it is"
        kinds["turned" if turn.quarters is not None else rotated] += 1
        seen.add((turn.quarters, turn.mirrored, turn.degrees))
    # One of 40 angles is 0.
    assert abs(kinds["turned"] / 2000 - 0.5) < 0.05
    assert abs(kinds["rotated"] / 2000 - 0.25 * 39 / 40) < 0.05
    turns = {s[:2] for s in seen if s[0] is not None}
    assert turns == {(k, axis) for k in range(4) for axis in range(2)}
    assert {s[2] for s in seen if s[0] is None} == set(range(-20, 20))
    for quarters, axis, degrees in [*turns_of(seen), (None, 0, 0)]:
        turn = Rotation(quarters, axis, degrees, 24)
        for values, found in (
            (image[..., 0], turn.image(image, config, pixels)[..., 0]),
            (label, turn.label(label, config)),
        ):
            expected = _published_turn(values, quarters, axis, degrees)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == values.dtype
        np.testing.assert_array_equal(turn.extent(), [0, 0, 24, 24])


def turns_of(seen):
    """Some of each kind."""
    return sorted(seen, key=str)[::5]


def _published_turn(values_hw, quarters, axis, degrees):
    """Position by position, from the published calls' definitions."""
    if quarters is not None:
        for _ in range(quarters):
            values_hw = values_hw.T[::-1]
        values_hw = values_hw[::-1] if axis == 0 else values_hw[:, ::-1]
    if degrees:
        values_hw = _rotate(values_hw, np.deg2rad(degrees))
    rows, columns = values_hw.shape
    zoomed = np.empty((24, 24), values_hw.dtype)
    for i in range(24):
        for j in range(24):
            row = np.floor(i * (rows - 1) / 23 + 0.5)
            column = np.floor(j * (columns - 1) / 23 + 0.5)
            zoomed[i, j] = values_hw[int(row), int(column)]
    return zoomed


def _rotate(values_hw, angle):
    rows, columns = values_hw.shape
    middle = np.array([(rows - 1) / 2, (columns - 1) / 2])
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rotated = np.zeros_like(values_hw)
    for i in range(rows):
        for j in range(columns):
            at = matrix @ (np.array([i, j]) - middle) + middle
            if (at >= 0).all() and (at <= [rows - 1, columns - 1]).all():
                row, column = np.floor(at + 0.5).astype(int)
                rotated[i, j] = values_hw[row, column]
    return rotated
