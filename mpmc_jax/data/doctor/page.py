"""A page on the labels of a data set: one HTML file without any other."""

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mpmc_jax import web_page
from mpmc_jax.data import decode, masks
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.check import Report
from mpmc_jax.data.doctor.diagnose import Finding
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.types import IGNORE_LABEL
from mpmc_jax.web_page import escape

_SIDE = 180  # Of a thumbnail, in pixels.
_PER_FINDING, _PROBLEMS, _EXAMPLES = 6, 12, 12

_BODY = """<p>{summary}</p>
{findings}
<h2>Classes</h2>
<table><tr><th>class<th>share of pixels<th><th>images</tr>
{classes}
</table>
<h2>Examples</h2>
<p>Each image, and its labels in color on it; void is white.</p>
{examples}"""


def render(
    source: Source, report: Report, findings: Sequence[Finding], summary: str
) -> str:
    """Returns the page.

    Args:
      source: the data set.
      report: the result of checking it.
      findings: what may be wrong with its labels.
      summary: a description of the data set, in lines.
    """
    samples = {s.id: s for split in source.splits.values() for s in split}
    problems = _locate(report.problems, samples)
    wrong = {key for problem in problems for key in problem.ids}
    labeled = [s for s in samples.values() if s.mask is not None and s.id not in wrong]
    step = max(len(labeled) // _EXAMPLES, 1)
    examples = [_figure(source, s) for s in labeled[::step][:_EXAMPLES]]
    found = {
        "Problems": _few_pictures(problems),
        "Warnings": [Finding("warning", text) for text in report.warnings],
        "Notes": [Finding("note", text) for text in report.notes],
    }
    for finding in findings:
        found["Warnings" if finding.level == "warning" else "Notes"].append(finding)
    sections = [
        _section(title, listed, source, samples) for title, listed in found.items()
    ]
    if not any(found.values()):
        sections.append("<p>Nothing was found that seems wrong.</p>")
    body = _BODY.format(
        summary="<br>".join(map(escape, summary.splitlines())),
        findings="\n".join(filter(None, sections)),
        classes="\n".join(_classes(source, report)),
        examples="\n".join(examples),
    )
    return web_page.page(f"Labels of {source.name}", body)


def _locate(problems: Sequence[str], samples: Mapping[str, Sample]) -> list[Finding]:
    """Returns the problems, with the image whose file a problem begins with."""
    named = {
        sample.name(part): sample.id
        for sample in samples.values()
        for part in ("image", "mask")
    }
    found = [(text, named.get(text.partition(": ")[0])) for text in problems]
    return [Finding("problem", text, (key,) if key else ()) for text, key in found]


def _few_pictures(problems: Sequence[Finding]) -> list[Finding]:
    """Returns the problems, of which only the first are shown with their image."""
    located = itertools.count(1)
    return [
        problem
        if not problem.ids or next(located) <= _PROBLEMS
        else dataclasses.replace(problem, ids=())
        for problem in problems
    ]


def _section(
    title: str,
    findings: Sequence[Finding],
    source: Source,
    samples: Mapping[str, Sample],
) -> str:
    if not findings:
        return ""
    items = []
    for finding in findings:
        shown = [samples[key] for key in finding.ids[:_PER_FINDING] if key in samples]
        figures = "".join(_figure(source, sample) for sample in shown)
        items.append(f"<li>{escape(finding.text)}<div>{figures}</div></li>")
    return f"<h2>{title} ({len(findings)})</h2>\n<ul>{''.join(items)}</ul>"


def _classes(source: Source, report: Report) -> list[str]:
    total = max(int(report.pixels.sum()), 1)
    labels = [*enumerate(source.class_names), (IGNORE_LABEL, "void")]
    rows = []
    for label, name in labels:
        share = report.pixels[label] / total
        color = source.palette[label] if label < len(source.palette) else (255,) * 3
        style = f"background: rgb{tuple(color)}"
        rows.append(
            f'<tr><td><span class="swatch" style="{style}"></span>{escape(name)}'
            f'<td class="n">{share:.2%}<td style="width: 40%">'
            f'<div class="bar" style="width: {share:.2%}"></div>'
            f'<td class="n">{report.images[label]}</tr>'
        )
    return rows


def _figure(source: Source, sample: Sample) -> str:
    """Returns an image and its labels side by side; "" if they cannot be read."""
    try:
        picture = _picture(source, sample)
    except (UnreadableImage, OSError):
        return ""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    alt = f"{sample.id} and its labels"
    return web_page.image(stream.getvalue(), "jpeg", alt, sample.id)


def _picture(source: Source, sample: Sample) -> Image.Image:
    image_hwc = decode.decode_stored(source_lib.read_bytes(sample.image), source.pixels)
    shown_hwc = _displayed(image_hwc)
    if sample.mask is None:
        return _shrunk(shown_hwc)
    content = source_lib.read_bytes(sample.mask)
    left, right = _shrunk(shown_hwc), _painted(content, source)
    right = right.resize(left.size, Image.Resampling.NEAREST)
    both = Image.new("RGB", (2 * left.width, left.height))
    both.paste(left, (0, 0))
    both.paste(Image.blend(left, right, 0.6), (left.width, 0))
    return both


def _painted(content: bytes, source: Source) -> Image.Image:
    """Returns labels in the colors of their classes; as stored if they are wrong."""
    try:
        label_hw = masks.read_mask(content, source.masks).label_hw
    except UnreadableImage:
        return decode.open_oriented(content)[0].convert("RGB")
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(source.palette)] = source.palette
    return Image.fromarray(colors[label_hw])


def _displayed(image_hwc: np.ndarray) -> np.ndarray:
    """Returns an image as RGB bytes; other types by their percentiles."""
    shown = image_hwc[..., :3] if image_hwc.shape[-1] >= 3 else image_hwc[..., :1]
    if shown.dtype != np.uint8:
        shown = np.nan_to_num(shown.astype(np.float32))
        low, high = np.percentile(shown, (1, 99), axis=(0, 1))
        shown = 255 * np.clip((shown - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.broadcast_to(shown, (*shown.shape[:2], 3)).astype(np.uint8)


def _shrunk(image_hwc: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image_hwc)
    scale = _SIDE / max(picture.size)
    size = tuple(max(round(scale * side), 1) for side in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.BOX)
