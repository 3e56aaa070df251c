"""The canvas of synthetic scenes, and positions on their ground."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from mpmc_jax.types import IGNORE_LABEL

FRAME = 2


@dataclasses.dataclass
class Canvas:
    """An image and its labels while they are drawn.

    Attributes:
      rng: generator of all random numbers of the scene.
      light: (h,w,3) float32 in 0..1.
      label: (h,w) uint8.
    """

    rng: np.random.Generator
    light: np.ndarray
    label: np.ndarray

    @classmethod
    def empty(cls, rng: np.random.Generator, size: tuple[int, int]) -> "Canvas":
        """Creates a black canvas of (rows, columns), all of class 0."""
        return cls(rng, np.zeros((*size, 3), np.float32), np.zeros(size, np.uint8))

    @property
    def rows(self) -> int:
        """Height in pixels."""
        return self.label.shape[0]

    @property
    def columns(self) -> int:
        """Width in pixels."""
        return self.label.shape[1]

    def color(self, *choices: tuple[float, float, float]) -> np.ndarray:
        """Returns one of the choices with a little noise."""
        base = choices[self.rng.integers(len(choices))]
        return np.clip(np.asarray(base) + self.rng.normal(0, 0.03, 3), 0.02, 1)

    def shape(self, kind: str, *points: tuple[float, float]) -> np.ndarray:
        """Returns (h,w) bool: the inside of a shape.

        Args:
          kind: "polygon", "ellipse" or "rectangle".
          *points: (x, y) of its corners.
        """
        image = Image.new("L", (self.columns, self.rows))
        getattr(ImageDraw.Draw(image), kind)([tuple(p) for p in points], fill=1)
        return np.asarray(image, bool)

    def noise(self, cell: int) -> np.ndarray:
        """Returns smooth noise (h,w) of unit deviation; features have `cell` pixels."""
        coarse = (self.rows // cell + 2, self.columns // cell + 2)
        values = self.rng.standard_normal(coarse).astype(np.float32)
        size = (self.columns, self.rows)
        return np.asarray(
            Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
        )

    def paint(
        self, where: np.ndarray, label: int, color: np.ndarray, texture: np.ndarray
    ) -> None:
        """Paints `where` with a class; `texture` (h,w) is added to its color."""
        rows, columns = (np.flatnonzero(where.any(axis)) for axis in (1, 0))
        if not rows.size:
            return
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside = where[box]
        shaded = color.astype(np.float32) + texture[box][..., None]
        np.copyto(self.label[box], np.uint8(label), where=inside)
        np.copyto(self.light[box], shaded, where=inside[..., None])

    def outline(self, where: np.ndarray) -> None:
        """Makes the border just outside of `where` void, as annotators do."""
        grown = where.copy()
        grown[1:] |= where[:-1]
        grown[:-1] |= where[1:]
        grown[:, 1:] |= where[:, :-1]
        grown[:, :-1] |= where[:, 1:]
        self.label[grown & ~where] = IGNORE_LABEL

    def photograph(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns image and labels with shadow, color cast, noise and a void frame."""
        rng = self.rng
        gain = rng.uniform(0.85, 1.15) * (1 + rng.normal(0, 0.02, 3))
        cast = rng.normal(0, 0.02, 3)
        grain = rng.standard_normal(self.light.shape, np.float32)
        light = self.light * (1 + 0.08 * self.noise(48))[..., None]
        light = light * gain.astype(np.float32) + cast.astype(np.float32)
        light += np.float32(rng.uniform(0.01, 0.04)) * grain
        label = self.label.copy()
        label[:FRAME] = label[-FRAME:] = IGNORE_LABEL
        label[:, :FRAME] = label[:, -FRAME:] = IGNORE_LABEL
        return (np.clip(light, 0, 1) * 255).astype(np.uint8), label


@dataclasses.dataclass(frozen=True)
class Ground:
    """A position on the ground.

    Attributes:
      horizon: row of the horizon.
      depth: 0 at the horizon, 1 at the lower border of the image.
      edges: columns of the road's left and right border at the bottom, and of its
        vanishing point.
    """

    horizon: float
    depth: float
    edges: tuple[float, float, float]

    def row(self, scene: Canvas) -> float:
        """Returns the row of the image at this depth."""
        return self.horizon + (scene.rows * 0.98 - self.horizon) * self.depth

    def scale(self, scene: Canvas) -> float:
        """Returns the rows that an object of unit height covers at this depth."""
        return scene.rows * (0.2 + 0.8 * self.depth)

    def road(self) -> tuple[float, float]:
        """Returns the columns of the road's borders at this depth."""
        left, right, vanishing = self.edges
        mix = 0.12 + 0.88 * self.depth
        near, far = left - vanishing, right - vanishing
        return vanishing + near * mix, vanishing + far * mix

    def beside(self, scene: Canvas) -> float:
        """Returns a random column on one of the pavements."""
        left, right = self.road()
        margin, strip = 0.04 * scene.columns, 0.1 * scene.columns
        if scene.rng.random() < 0.5:
            return scene.rng.uniform(margin, max(left, margin + strip))
        far = scene.columns - margin
        return scene.rng.uniform(min(right, far - strip), far)
