"""Generates street scenes with exact labels, free of any license.

Every scene has its own light, haze, colors and layout, so that color alone does not
tell classes apart: cars and signs share hues with buildings, pavements with walls, and
everything is noisy. Scene i depends only on (seed, i).
"""

import numpy as np

from mpmc_jax.data.builders.canvas import FRAME, Canvas, Ground
from mpmc_jax.data.decode import encode_png
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import RGB

CLASSES = {
    "sky": (120, 170, 220),
    "building": (140, 70, 60),
    "road": (110, 80, 120),
    "pavement": (220, 150, 200),
    "tree": (60, 130, 50),
    "car": (30, 60, 170),
    "pole": (190, 190, 150),
    "person": (220, 50, 60),
    "sign": (240, 210, 40),
}
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, POLE, PERSON, SIGN = range(len(CLASSES))
SIZES = ((160, 224), (144, 208))


def make_source(
    train: int = 480,
    val: int = 60,
    *,
    seed: int = 0,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> Source:
    """Draws `train` + `val` scenes, whose (rows, columns) cycle through `sizes`."""
    ids = [f"scene_{i:05d}" for i in range(train + val)]

    def sample(i: int) -> Sample:
        rgb_hwc, label_hw = draw_scene(seed, i, sizes[i % len(sizes)])
        return Sample(ids[i], encode_png(rgb_hwc), encode_png(label_hw))

    samples = tuple(map(sample, range(train + val)))
    return Source(
        name="synthetic",
        class_names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        pixels=RGB,
        splits={"train": samples[:train], "val": samples[train:]},
    )


def draw_scene(
    seed: int, index: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws image (h,w,3) uint8 and labels (h,w) uint8 of a scene; 255 is void."""
    rng = np.random.default_rng((seed, index))
    scene = Canvas.empty(rng, size)
    horizon = scene.rows * rng.uniform(0.38, 0.52)
    _draw_sky(scene)
    _draw_buildings(scene, horizon)
    edges = _draw_ground(scene, horizon)
    for _ in range(rng.integers(2, 5)):
        _draw_tree(scene, horizon)
    # Distant objects are drawn first, so that near ones hide them.
    objects = [_draw_car] * rng.integers(1, 4) + [_draw_person] * rng.integers(2, 5)
    objects += [_draw_pole] * rng.integers(2, 5) + [_draw_sign] * rng.integers(2, 4)
    depths = np.sort(rng.uniform(0.1, 1.0, len(objects)))
    for depth, which in zip(depths, rng.permutation(len(objects)), strict=True):
        objects[which](scene, Ground(horizon, depth, edges))
    return scene.photograph()


def _draw_sky(scene: Canvas) -> None:
    top = scene.color((0.45, 0.62, 0.9), (0.7, 0.75, 0.82), (0.85, 0.7, 0.6))
    fade = np.linspace(0, 0.25, scene.rows, dtype=np.float32)[:, None]
    everywhere = np.ones(scene.label.shape, bool)
    scene.paint(everywhere, SKY, top, fade + 0.06 * scene.noise(24))


def _draw_buildings(scene: Canvas, horizon: float) -> None:
    rng = scene.rng
    x = rng.uniform(-20, 10)
    row, column = np.mgrid[: scene.rows, : scene.columns]
    while x < scene.columns:
        width, height = rng.uniform(28, 70), rng.uniform(0.35, 0.95) * horizon
        if rng.random() < 0.85:
            where = scene.shape(
                "rectangle", (x, horizon - height), (x + width, horizon + 4)
            )
            wall = scene.color(
                (0.6, 0.33, 0.26),
                (0.72, 0.62, 0.48),
                (0.5, 0.48, 0.47),
                (0.4, 0.3, 0.3),
            )
            pitch = rng.integers(8, 14)
            window = ((column - int(x)) % pitch > pitch // 2) & (
                row % pitch > pitch // 2
            )
            texture = -0.22 * window + 0.03 * scene.noise(2)
            scene.paint(where, BUILDING, wall, texture.astype(np.float32))
        x += width + rng.uniform(0, 8)


def _draw_ground(scene: Canvas, horizon: float) -> tuple[float, float, float]:
    """Draws the pavement and the road on it; returns the road's edges."""
    rng, columns, rows = scene.rng, scene.columns, scene.rows
    edges = (
        columns * rng.uniform(-0.05, 0.25),
        columns * rng.uniform(0.75, 1.05),
        columns * rng.uniform(0.35, 0.65),
    )
    row, column = np.mgrid[:rows, :columns]
    slabs = ((row % 9 == 0) | ((column + row // 2) % 13 == 0)) * np.float32(-0.12)
    ground = scene.shape("rectangle", (0, horizon), (columns, rows))
    stone = scene.color((0.68, 0.6, 0.56), (0.6, 0.56, 0.5), (0.72, 0.68, 0.66))
    scene.paint(ground, PAVEMENT, stone, slabs + 0.03 * scene.noise(2))
    left, right = Ground(horizon, 0.0, edges).road()
    road = scene.shape(
        "polygon", (left, horizon), (right, horizon), (edges[1], rows), (edges[0], rows)
    )
    asphalt = scene.color((0.33, 0.33, 0.36), (0.42, 0.41, 0.42), (0.27, 0.27, 0.3))
    scene.paint(road, ROAD, asphalt, 0.04 * scene.noise(1) + 0.03 * scene.noise(12))
    dashes = scene.shape(
        "polygon",
        (edges[2] - 1, horizon),
        (edges[2] + 1, horizon),
        ((edges[0] + edges[1]) / 2 + 5, rows),
        ((edges[0] + edges[1]) / 2 - 5, rows),
    )
    scene.light[dashes & road & (row % 24 < 12)] = 0.85
    return edges


def _draw_tree(scene: Canvas, horizon: float) -> None:
    rng = scene.rng
    x, radius = rng.uniform(0, scene.columns), rng.uniform(12, 26)
    y = horizon - rng.uniform(0.6, 1.4) * radius
    where = scene.shape("rectangle", (x - 2, y), (x + 2, horizon + 6))
    for _ in range(6):
        dx, dy = rng.uniform(-0.6, 0.6, 2) * radius
        part = radius * rng.uniform(0.45, 0.75)
        where |= scene.shape(
            "ellipse", (x + dx - part, y + dy - part), (x + dx + part, y + dy + part)
        )
    leaf = scene.color((0.2, 0.4, 0.14), (0.35, 0.45, 0.15), (0.14, 0.3, 0.2))
    scene.paint(where, TREE, leaf, 0.1 * scene.noise(2) + 0.06 * scene.noise(6))


def _draw_car(scene: Canvas, ground: Ground) -> None:
    rng = scene.rng
    left, right = ground.road()
    x, y = rng.uniform(left, right), ground.row(scene)
    height = max(14.0, 0.3 * ground.scale(scene))
    half = height * rng.uniform(0.75, 1.2)
    body = scene.shape("rectangle", (x - half, y - 0.6 * height), (x + half, y - 4))
    roof = scene.shape(
        "polygon",
        (x - 0.75 * half, y - 0.55 * height),
        (x - 0.5 * half, y - height),
        (x + 0.5 * half, y - height),
        (x + 0.75 * half, y - 0.55 * height),
    )
    wheels = np.zeros_like(body)
    for side in (-0.6, 0.6):
        wheels |= scene.shape(
            "ellipse",
            (x + side * half - 0.17 * height, y - 0.3 * height),
            (x + side * half + 0.17 * height, y),
        )
    paint = scene.color(
        (0.75, 0.1, 0.1),
        (0.1, 0.2, 0.65),
        (0.9, 0.9, 0.92),
        (0.1, 0.1, 0.12),
        (0.85, 0.65, 0.1),
    )
    gloss = np.linspace(0.25, -0.2, scene.rows, dtype=np.float32)[:, None]
    flat = np.zeros(scene.label.shape, np.float32)
    scene.paint(body | roof, CAR, paint, flat + gloss * 0.5)
    scene.light[roof] = 0.55 * scene.light[roof] + np.array([0.05, 0.08, 0.1])
    scene.paint(wheels, CAR, np.full(3, 0.06), flat)
    scene.outline(body | roof | wheels)


def _draw_pole(scene: Canvas, ground: Ground) -> None:
    rng = scene.rng
    x, y = ground.beside(scene), ground.row(scene)
    half = 1.7 + 1.3 * ground.depth
    top = y - rng.uniform(0.45, 0.7) * scene.rows
    where = scene.shape("rectangle", (x - half, top), (x + half, y))
    metal = scene.color((0.25, 0.27, 0.27), (0.5, 0.52, 0.5), (0.75, 0.75, 0.7))
    column = np.arange(scene.columns, dtype=np.float32)[None]
    round_off = np.broadcast_to(-0.07 * np.abs(column - x), scene.label.shape)
    scene.paint(where, POLE, metal, round_off)


def _draw_person(scene: Canvas, ground: Ground) -> None:
    rng = scene.rng
    x = ground.beside(scene) if rng.random() < 0.8 else rng.uniform(*ground.road())
    y, height = ground.row(scene), max(22.0, 0.4 * ground.scale(scene))
    half = 0.15 * height
    legs = scene.shape("rectangle", (x - half, y - 0.48 * height), (x + half, y))
    torso = scene.shape(
        "ellipse",
        (x - 1.4 * half, y - 0.88 * height),
        (x + 1.4 * half, y - 0.4 * height),
    )
    head = scene.shape(
        "ellipse", (x - 0.75 * half, y - height), (x + 0.75 * half, y - 0.78 * height)
    )
    folds = 0.06 * scene.noise(3)
    trousers = scene.color((0.15, 0.17, 0.35), (0.12, 0.12, 0.12), (0.5, 0.42, 0.3))
    shirt = scene.color(
        (0.85, 0.2, 0.25), (0.2, 0.55, 0.75), (0.9, 0.85, 0.8), (0.3, 0.6, 0.3)
    )
    skin = scene.color((0.9, 0.72, 0.6), (0.6, 0.42, 0.32), (0.4, 0.28, 0.2))
    scene.paint(legs, PERSON, trousers, folds)
    scene.paint(torso, PERSON, shirt, folds)
    scene.paint(head, PERSON, skin, folds)
    scene.outline(legs | torso | head)


def _draw_sign(scene: Canvas, ground: Ground) -> None:
    rng = scene.rng
    x, y = ground.beside(scene), ground.row(scene)
    radius = 7.0 + 6.0 * ground.depth
    top = max(y - rng.uniform(0.35, 0.55) * scene.rows, radius + FRAME)
    post = scene.shape("rectangle", (x - 1.2, top), (x + 1.2, y))
    flat = np.zeros(scene.label.shape, np.float32)
    scene.paint(post, POLE, scene.color((0.45, 0.45, 0.45)), flat)
    kind = ("ellipse", "rectangle")[rng.integers(2)]
    plate = scene.shape(kind, (x - radius, top - radius), (x + radius, top + radius))
    inner = scene.shape(
        kind,
        (x - 0.6 * radius, top - 0.6 * radius),
        (x + 0.6 * radius, top + 0.6 * radius),
    )
    rim = scene.color((0.85, 0.1, 0.12), (0.1, 0.25, 0.75), (0.95, 0.8, 0.1))
    scene.paint(plate, SIGN, rim, flat)
    scene.paint(inner, SIGN, np.array([0.95, 0.95, 0.93]), flat)
    scene.outline(plate)
