"""Compares exported programs with the run that they were made of, on real images.

python results/export_parity/compare.py RUN IMAGES PYTHON_JAX PYTHON_ONNX FOLDER

The two interpreters have what a loader needs and nothing else: jax, flatbuffers and
numpy; onnxruntime and numpy. Of IMAGES, a folder, the first 20 are taken in turn at
their own size and at three others. Prints a JSON object for each format.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mpmc_jax import load_run
from mpmc_jax.experiments import exported

COUNT = 20
# Of the stored rows and columns.
SCALES = ((1.0, 1.0), (0.75, 0.75), (0.6, 0.9), (1.1, 0.5))


def read(paths):
    """Groups images by size: (rows, columns) -> (n,rows,columns,3) uint8."""
    found = {}
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            rows, columns = (
                round(side * scale)
                for side, scale in zip(
                    image.size[::-1], SCALES[i % len(SCALES)], strict=True
                )
            )
            pixels = np.asarray(image.convert("RGB").resize((columns, rows)))
        found.setdefault((rows, columns), []).append(pixels)
    return {size: np.stack(images) for size, images in found.items()}


def report(about, found, expected):
    """Prints how many pixels of which images differ."""
    pairs = [(found[size], expected[size]) for size in expected]
    result = about | {
        "images": sum(len(x) for x in expected.values()),
        "sizes": list(expected),
        "pixels": sum(x.size for x in expected.values()),
        "different": sum(int((ours != theirs).sum()) for ours, theirs in pairs),
        "classes": sorted({int(c) for x in expected.values() for c in np.unique(x)}),
    }
    print(json.dumps(result), flush=True)


def main(run_folder, images, python_jax, python_onnx, folder):
    """Exports the run in each format, predicts with each, and reports."""
    folder = Path(folder)
    run = load_run(run_folder)
    given = read(sorted(Path(images).iterdir())[:COUNT])
    expected = {size: np.stack(run.predict(list(x))) for size, x in given.items()}
    exported.write_weights(run, folder, "run", "last")
    read_back = load_run(folder / "weights.safetensors")
    report(
        {"format": "weights", "packages": ["mpmc_jax"]},
        {size: np.stack(read_back.predict(list(x))) for size, x in given.items()},
        expected,
    )
    for form, python in (("stablehlo", python_jax), ("onnx", python_onnx)):
        place = folder / form
        place.mkdir(parents=True)
        exported.write_programs(run, place, form, list(given), ["cpu"])
        loader = (place / f"predict_{form}.py").read_text()
        found = {}
        for size, arrays in given.items():
            np.save(place / "images.npy", arrays)
            name = f"{size[0]}x{size[1]}"
            own = place / f"predict_{name}.py"
            rows, columns = next(iter(given))
            first = f"{rows}x{columns}"
            own.write_text(loader.replace(f"segment_{first}.", f"segment_{name}."))
            command = [python, own, place / "images.npy", place / "classes.npy"]
            subprocess.run(command, check=True, cwd=place)
            found[size] = np.load(place / "classes.npy")
        command = [python, "-m", "pip", "list", "--format=freeze"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
        report({"format": form, "packages": listed.stdout.split()}, found, expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
