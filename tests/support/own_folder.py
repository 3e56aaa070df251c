"""Images and masks of a user's folder, written for tests."""

import numpy as np
import tifffile
from PIL import Image

SIZE = (24, 32)
LABEL = np.repeat(np.arange(4, dtype=np.uint8), 6)[:, None].repeat(32, 1)
COLORS = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200)], np.uint8)


def write_image(path, seed=0, shape=(*SIZE, 3), dtype=np.uint8):
    """Writes an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(path.name)])
    values = rng.integers(0, 200, shape).astype(dtype)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, np.moveaxis(values, -1, 0), photometric="minisblack")
    else:
        Image.fromarray(values).save(path)


def write_mask(path, values, palette=None):
    """Writes a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette.ravel().tolist())
    image.save(path)
