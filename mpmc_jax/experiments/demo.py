"""Answers of the demonstration page: an image's prediction as HTML, and as files.

Nothing here needs gradio, which shows the page.
"""

import dataclasses
import io
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mpmc_jax import web_page
from mpmc_jax.data import decode
from mpmc_jax.evaluation import pictures, prediction_files
from mpmc_jax.evaluation.predict import Band
from mpmc_jax.experiments.patch_maps import patch_classifier
from mpmc_jax.experiments.run import Run
from mpmc_jax.text import first_line, quantity

MAX_BYTES = 50_000_000
MAX_PIXELS = 25_000_000
_FILES = ("index", "color", "overlay", "entropy")
# The largest side of a picture on the page, and of a map below it.
_SHOWN, _SHOWN_MAP = 1600, 640
# Maps of single classes, those that the patch classifier is surest of.
_MAPS = 12
_CAPTION = (
    "patches: share of the patches in which the patch classifier gives the class more "
    "than 50 %"
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the page shows for a file.

    Attributes:
      message: HTML that says what was predicted, or why nothing was.
      picture: HTML of the image below the colors of the classes.
      legend: HTML of the classes with their colors and shares.
      maps: HTML of the confidence, lambda_s, and the classes of patches.
      files: the results, to be downloaded.
    """

    message: str
    picture: str = ""
    legend: str = ""
    maps: str = ""
    files: tuple[pathlib.Path, ...] = ()


class Demo:
    """Predicts one file at a time."""

    def __init__(
        self,
        run: Run,
        folder: pathlib.Path,
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
    ):
        """Takes a run, and a folder for the files of the last prediction."""
        self._run, self._folder = run, folder
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._patches = None if run.probe is None else patch_classifier(run)

    def __call__(self, file: str | None) -> Answer:
        """Predicts an image file; a file that cannot be predicted gives a message."""
        if file is None:
            return Answer("")
        path = pathlib.Path(file)
        try:
            return self._answer(path)
        # Decoders raise errors of their own, and a network fails on some sizes.
        except Exception as error:
            said = f"{path.name} was not predicted: {first_line(error, limit=None)}"
            return Answer(f'<p role="alert" class="wrong">{web_page.escape(said)}</p>')

    def _answer(self, path: pathlib.Path) -> Answer:
        image = self._read(path)
        facts, predictor = self._run.facts, self._run.predictor
        size = image.shape[:2]
        confidence = np.empty(size, np.float32)

        def bands() -> Iterator[Band]:
            for band in predictor.bands(image, probabilities=True):
                rows = slice(band.top, band.top + len(band.classes))
                assert band.probabilities is not None
                confidence[rows] = band.probabilities.max(-1)
                yield band

        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        name = pathlib.Path(tempfile.mkdtemp(dir=self._folder), path.stem)
        shown = pictures.displayable(image, facts.pixels)
        targets = prediction_files.paths(name, _FILES)
        classes = prediction_files.write_prediction(
            targets, bands(), shown, facts.palette
        )
        presence, weight = None, None
        if self._patches is not None and not predictor.uses_windows(size):
            presence = self._patches.classify(image[None]).probabilities[0]
            weight = self._patches.lambda_s(image[None], classes[None])[0]
        said = (
            f"{path.name}: {size[1]} x {size[0]} pixels, mean confidence "
            f"{100 * confidence.mean():.1f} %"
        )
        if self._patches is not None and presence is None:
            said += (
                ". It was predicted in windows; the patch classifier takes at most "
                f"{quantity(predictor.window_above, 'pixel')}"
            )
        return Answer(
            f"<p>{web_page.escape(said)}</p>",
            self._picture(shown, classes),
            self._legend(classes, confidence, presence),
            self._maps(confidence, weight, presence),
            tuple(targets.values()),
        )

    def _read(self, path: pathlib.Path) -> np.ndarray:
        """Reads an image that is not larger than the limits.

        Raises:
          ValueError: it is larger, or cannot be read.
        """
        if path.stat().st_size > self._max_bytes:
            raise ValueError(
                f"the file is larger than {self._max_bytes / 1e6:.0f} MB, the limit of "
                "this page; launch.predict has none"
            )
        content = path.read_bytes()
        rows, columns = decode.read_header(content).size
        if rows * columns > self._max_pixels:
            raise ValueError(
                f"{columns} x {rows} pixels are more than {self._max_pixels}, the "
                "limit of this page; launch.predict has none"
            )
        return decode.decode_array(content, self._run.facts.pixels)

    def _picture(self, shown: np.ndarray, classes: np.ndarray) -> str:
        """Makes the image and, over it, the colors, whose opacity a slider sets."""
        colors = pictures.colorize(classes, self._run.facts.palette)
        below = web_page.data_uri(_jpeg(shown), "jpeg")
        above = web_page.data_uri(_png(colors, _SHOWN), "png")
        return (
            f'<div class="stack"><img src="{below}" alt="the image">'
            f'<img class="colors" src="{above}" alt="the predicted classes"></div>'
        )

    def _legend(
        self,
        classes: np.ndarray,
        confidence: np.ndarray,
        presence: np.ndarray | None,
    ) -> str:
        """Makes the table of the classes that are predicted, the largest first."""
        facts = self._run.facts
        counts = np.bincount(classes.ravel(), minlength=facts.num_classes)
        sums = np.bincount(classes.ravel(), confidence.ravel(), facts.num_classes)
        head = ["class", "pixels, %", "confidence, %"]
        head += [] if presence is None else ["patches, %"]
        rows = []
        for index in np.argsort(-counts, kind="stable"):
            in_patches = None if presence is None else presence[..., index] > 0.5
            if not counts[index] and (in_patches is None or not in_patches.any()):
                continue
            color = "rgb({}, {}, {})".format(*facts.palette[index])
            name = web_page.escape(facts.class_names[index])
            cells = [f'<span class="swatch" style="background:{color}"></span>{name}']
            cells.append(f"{100 * counts[index] / classes.size:.1f}")
            cells.append(
                f"{100 * sums[index] / counts[index]:.1f}" if counts[index] else "-"
            )
            if in_patches is not None:
                cells.append(f"{100 * in_patches.mean():.1f}")
            rows.append(
                "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
            )
        top = "".join(f'<th scope="col">{each}</th>' for each in head)
        note = "" if presence is None else f"<caption>{_CAPTION}</caption>"
        return (
            '<div class="wide" tabindex="0" role="region" aria-label="classes">'
            f"<table>{note}<tr>{top}</tr>{''.join(rows)}</table></div>"
        )

    def _maps(
        self,
        confidence: np.ndarray,
        weight: np.ndarray | None,
        presence: np.ndarray | None,
    ) -> str:
        """Makes gray maps: confidence, lambda_s, and each class in the patches."""
        names = self._run.facts.class_names
        found = [_map(confidence, "confidence", "white where the network is sure")]
        if weight is not None:
            low, high = weight.min(), weight.max()
            note = f"black {low:.2f}, white {high:.2f}"
            found.append(
                _map(pictures.heat_map(weight)[..., 0] / 255, "lambda_s", note)
            )
        if presence is not None:
            surest = presence.max((0, 1))
            for index in np.argsort(-surest, kind="stable")[:_MAPS]:
                title = f"{names[index]} in patches"
                note = f"at most {100 * surest[index]:.0f} %"
                found.append(_map(presence[..., index], title, note))
        return f'<div class="grid">{"".join(found)}</div>'


def _map(values: np.ndarray, title: str, note: str) -> str:
    """Makes a figure of values from 0, black, to 1, white."""
    gray = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    content = _png(gray, _SHOWN_MAP)
    return web_page.image(content, "png", f"{title}: {note}", f"{title}: {note}")


def _png(array: np.ndarray, side: int) -> bytes:
    """Encodes classes or values; a larger picture keeps every n-th pixel."""
    step = -(-max(array.shape[:2]) // side)
    return pictures.as_png(Image.fromarray(array[::step, ::step]))


def _jpeg(shown: np.ndarray) -> bytes:
    image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
    image.thumbnail((_SHOWN, _SHOWN))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
