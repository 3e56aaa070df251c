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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
from matplotlib.figure import Figure as Canvas
from PIL import Image

from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.evaluation.pictures import as_png
from mpmc_jax.experiments.run import Run, load_run, use_data
from mpmc_jax.training.checkpoint import files
from mpmc_jax.training.metric_writer import read_metrics
from mpmc_jax.training.workdir import CHECKPOINTS

_DPI = 110
_ALL = "all"
# One picture gives one file: without them an SVG has a date and random identifiers.
_SVG: Any = {"svg.hashsalt": "mpmc_jax"}
_UNDATED: Any = {"Date": None}


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The directory of a run, and which checkpoint of it a figure reads.

    Attributes:
      workdir: the directory that the run was trained in.
      checkpoint: "best", "last" or a step; "all" for figures over training.
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

    @functools.cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; see `read_metrics` for its errors."""
        return read_metrics(self.workdir / "metrics.jsonl")

    @property
    def classifying(self) -> Run:
        """The restored run, which has a patch classifier.

        Raises:
          ValueError: it has none.
        """
        if self.restored.probe is None:
            raise ValueError(
                f"{self.name} was trained without a patch classifier (mpmc=off), and "
                "this figure reads one; give a run of mpmc=paper or mpmc=recommended"
            )
        return self.restored

    def series(self) -> Iterator["SavedRun"]:
        """Yields the run at each of its checkpoints if `checkpoint` is "all"."""
        if self.checkpoint != _ALL:
            yield self
            return
        directory = self.workdir / CHECKPOINTS
        # Without checkpoints, "last" raises the error that says so.
        steps = files.steps(directory) if directory.is_dir() else []
        for step in steps or ["last"]:
            yield dataclasses.replace(self, checkpoint=str(step))


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
      others: contents of further files, by their paths in the picture's folder.
    """

    png: bytes
    svg: bytes
    rows: list[dict[str, Any]]
    others: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def write(self, stem: Path) -> list[Path]:
        """Writes STEM.png, STEM.svg, STEM.csv and `others`, and returns their paths.

        Raises:
          ValueError: a file would be written into the directory of a run.
          OSError: a file cannot be written.
        """
        table = io.StringIO(newline="")
        if self.rows:
            writer = csv.DictWriter(table, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        contents = {
            stem.with_name(f"{stem.name}.png"): self.png,
            stem.with_name(f"{stem.name}.svg"): self.svg,
            stem.with_name(f"{stem.name}.csv"): table.getvalue().encode(),
        }
        for name, content in self.others.items():
            path = stem.parent / name
            contents[path] = content
            if (path.parent / CHECKPOINTS).exists():
                raise ValueError(
                    f"{path.parent} is a run, whose files would be written over; "
                    "choose another --output"
                )
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        return [*contents]


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
