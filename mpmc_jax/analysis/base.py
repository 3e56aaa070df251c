"""The interface of figures: options and saved runs in, a picture and a table out.

A figure is one file of `analysis/` with a subclass of `Figure`, and one line of
`registry.FIGURES`.
"""

import abc
import base64
import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
from matplotlib.figure import Figure as Canvas
from PIL import Image

from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.evaluation.pictures import as_png
from mpmc_jax.experiments.run import Run, load_run, use_data

_DPI = 110
# One picture gives one file: without them an SVG has a date and random identifiers.
_SVG: Any = {"svg.hashsalt": "mpmc_jax"}
_UNDATED: Any = {"Date": None}


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The directory of a run, and which checkpoint of it a figure reads.

    Attributes:
      workdir: the directory that the run was trained in.
      checkpoint: "best", "last" or a step.
      data_dir: folder of prepared data sets; "" for the run's own.
    """

    workdir: Path
    checkpoint: str = "best"
    data_dir: str = ""

    @property
    def name(self) -> str:
        """The last part of the directory's path, by which figures name the run."""
        return self.workdir.absolute().name

    @functools.cached_property
    def restored(self) -> Run:
        """The run, restored at the first use; see `load_run` for its errors."""
        return use_data(load_run(self.workdir, self.checkpoint), self.data_dir)


def by_name(runs: Sequence[SavedRun]) -> dict[str, SavedRun]:
    """Returns the runs by their names.

    Raises:
      ValueError: two runs have the same name.
    """
    named = {run.name: run for run in runs}
    if len(named) < len(runs):
        raise ValueError("two runs have the same name; their results would collide")
    return named


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A drawn figure.

    Attributes:
      png: the picture as a PNG file.
      svg: the picture as an SVG file.
      rows: the numbers that the picture shows, as rows of a table whose columns are the
        keys of the first row.
    """

    png: bytes
    svg: bytes
    rows: list[dict[str, Any]]

    def files(self, stem: Path) -> dict[Path, bytes]:
        """Returns the contents of STEM.png, STEM.svg and STEM.csv by path."""
        table = io.StringIO(newline="")
        if self.rows:
            writer = csv.DictWriter(table, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        contents = {
            "png": self.png,
            "svg": self.svg,
            "csv": table.getvalue().encode(),
        }
        return {
            stem.with_name(f"{stem.name}.{suffix}"): content
            for suffix, content in contents.items()
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes STEM.png, STEM.svg and STEM.csv, and returns their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = self.files(stem)
        for path, content in files.items():
            write_bytes(path, content)
        return [*files]


class Figure(abc.ABC):
    """A figure: its options, and how it is drawn from saved runs.

    A subclass is a frozen dataclass. Its fields are the figure's options; each is a
    number or a text and has a default. The first line of its docstring says what the
    figure shows.

    Attributes:
      checkpoint: the checkpoint that the figure reads where none is named.
    """

    checkpoint: ClassVar[str] = "best"

    @abc.abstractmethod
    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws the figure of at least one run.

        Raises:
          ValueError, OSError: the runs do not have what the figure shows; the message
            says what is missing.
        """


def drawing_of(canvas: Canvas, rows: list[dict[str, Any]]) -> Drawing:
    """Makes a drawing of a Matplotlib figure and its numbers."""
    png, svg = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png", dpi=_DPI)
    with matplotlib.rc_context(_SVG):
        canvas.savefig(svg, format="svg", metadata=_UNDATED)
    return Drawing(png.getvalue(), svg.getvalue(), rows)


def drawing_of_picture(picture: Image.Image, rows: list[dict[str, Any]]) -> Drawing:
    """Makes a drawing of a picture of pixels and its numbers.

    The SVG file embeds the pixels, so that it scales them as they are.
    """
    png = as_png(picture)
    width, height = picture.size
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">\n'
        f'<image width="{width}" height="{height}" style="image-rendering: pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(png).decode()}"/>\n</svg>\n'
    )
    return Drawing(png, svg.encode(), rows)


def default_options(figure: type[Figure]) -> Mapping[str, Any]:
    """Returns the default of each option of a figure, by name."""
    return {field.name: field.default for field in dataclasses.fields(figure)}  # pyright: ignore[reportArgumentType]
