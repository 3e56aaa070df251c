"""Reads annotated shapes: labelme's, Supervisely's and COCO's JSON files.

    labelme       images/a.jpg with images/a.json, or the JSON in another folder
    Supervisely   meta.json, NAME/img/a.jpg with NAME/ann/a.jpg.json
    COCO          JSON files with "images", "annotations" and "categories" in SOURCE or
                  annotations/, or beside the images

Shapes that are drawn later cover earlier ones; those of COCO are drawn from the largest
to the smallest. Where no shape is, the class is "background", or void if the classes in
classes.json have no such name.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpmc_jax.data import decode, files, lists
from mpmc_jax.data.decode import Color
from mpmc_jax.data.own import layout
from mpmc_jax.data.own.shapes import Drawing, Shape
from mpmc_jax.data.source import Derived
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

BACKGROUND = "background"
# Names of labelme's for background and void.
_BACKGROUNDS = ("background", "_background_")
_VOID = "__ignore__"
_CIRCLE_POINTS = 64
# What reading JSON of another structure than expected raises.
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)


@dataclasses.dataclass
class Annotations:
    """The annotations of a folder.

    Attributes:
      kind: name of the format.
      drawings: id of an image -> its shapes.
      names: id of an image -> name of its annotations for messages.
      classes: names of the classes, without background.
      colors: class name -> color, where the format has colors.
      read: names directly below the folder that hold the annotations.
    """

    kind: str
    drawings: dict[str, Drawing]
    names: dict[str, str]
    classes: list[str]
    colors: dict[str, Color] = dataclasses.field(default_factory=dict)
    read: set[str] = dataclasses.field(default_factory=set)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that classes.json should name."""
        return (BACKGROUND, *self.classes)

    def palette(self) -> list[Color]:
        """Returns a color per class, black for background; [] where none is known."""
        if not self.classes or not self.colors.keys() >= {*self.classes}:
            return []
        found = [(0, 0, 0), *(self.colors[name] for name in self.classes)]
        return found if len(set(found)) == len(found) else []

    def masks(self, class_names: tuple[str, ...]) -> dict[str, Derived]:
        """Returns the masks by id of their image; shapes of other names are void."""
        labels = {name: i for i, name in enumerate(class_names)}
        for name in (*self.classes, _VOID):
            labels.setdefault(name, IGNORE_LABEL)
        ground = labels.get(BACKGROUND, IGNORE_LABEL)
        labels |= dict.fromkeys(_BACKGROUNDS, ground)
        return {
            key: drawing.as_mask(self.names[key], labels, ground)
            for key, drawing in self.drawings.items()
        }


def find(
    directory: pathlib.Path,
    images: Mapping[str, pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> Annotations | None:
    """Finds the annotations of images; None if there are none.

    Args:
      directory: the user's folder.
      images: id -> image.
      problems: gets one line for each file that cannot be read.
      notes: gets one line for each kind of shape that is not drawn.
    """
    documents = [
        path
        for path in files.find(directory, (".json",), []).read
        if path.name != "classes.json"
    ]
    if not documents:
        return None
    if (directory / "meta.json").is_file():
        found = _supervisely(directory, images, problems, notes)
    elif beside := _labelme_files(documents, images):
        found = _labelme(beside, images, problems, notes)
    else:
        whole = {path: _load(path, problems) for path in documents}
        coco = {path: facts for path, facts in whole.items() if _is_coco(facts)}
        found = _coco(coco, images, problems) if coco else None
    if found is not None:
        found.read = {path.relative_to(directory).parts[0] for path in documents}
        _note_blank(directory, found, notes)
    return found


def _note_blank(directory: pathlib.Path, found: Annotations, notes: list[str]) -> None:
    blank = [key for key, drawing in found.drawings.items() if not drawing.shapes]
    if blank:
        notes.append(
            f"{directory}: {quantity(len(blank), 'image')} of the {found.kind} "
            f"annotations without a shape, all background: {shorten(blank)}; if they "
            "were not annotated, list them in unlabeled.txt"
        )


def _load(path: pathlib.Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        problems.append(f"{path}: not JSON ({error}); copy or export it again")
        return None


def _labelme_files(
    documents: list[pathlib.Path], images: Mapping[str, pathlib.Path]
) -> dict[str, pathlib.Path]:
    """Returns id -> JSON file of the same name as the image."""
    by_place = {path.with_suffix(""): path for path in documents}
    by_stem = {lists.composed(path.stem): path for path in documents}
    found = {}
    for key, image in images.items():
        path = by_place.get(image.with_suffix("")) or by_stem.get(key.split("/")[-1])
        if path is not None:
            found[key] = path
    return found


def _labelme(
    documents: dict[str, pathlib.Path],
    images: Mapping[str, pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> Annotations:
    drawings: dict[str, Drawing] = {}
    names: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for key, path in documents.items():
        if (facts := _load(path, problems)) is None:
            continue
        try:
            shapes = [*_labelme_shapes(facts["shapes"], path, left_out)]
            size = (facts.get("imageHeight"), facts.get("imageWidth"))
            drawings[key] = Drawing(_size(size, images[key]), tuple(shapes))
            names[key] = str(path)
        except _MALFORMED as error:
            problems.append(f"{path}: not a file of labelme ({error!r})")
    _note_left_out(left_out, notes)
    used = {shape.name for drawing in drawings.values() for shape in drawing.shapes}
    classes = sorted(used - {*_BACKGROUNDS, _VOID})
    return Annotations("labelme", drawings, names, classes)


def _labelme_shapes(
    shapes: list[dict], path: pathlib.Path, left_out: dict[str, list[str]]
) -> Iterator[Shape]:
    for shape in shapes:
        name, points = str(shape["label"]), shape["points"]
        kind = shape.get("shape_type") or "polygon"
        if kind == "polygon":
            yield Shape(name, (points,))
        elif kind == "rectangle":
            (x0, y0), (x1, y1) = points
            yield Shape(name, ([[x0, y0], [x1, y0], [x1, y1], [x0, y1]],))
        elif kind == "circle":
            center, edge = np.array(points, float)
            angles = np.linspace(0, 2 * np.pi, _CIRCLE_POINTS, endpoint=False)
            ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            ring = center + ring * np.hypot(*(edge - center))
            yield Shape(name, (ring.tolist(),))
        elif kind == "mask":
            x, y = points[0]
            yield Shape(name, bitmap=shape["mask"], corner=(round(x), round(y)))
        else:
            left_out.setdefault(kind, []).append(str(path))


def _supervisely(
    directory: pathlib.Path,
    images: Mapping[str, pathlib.Path],
    problems: list[str],
    notes: list[str],
) -> Annotations | None:
    meta = _load(directory / "meta.json", problems)
    try:
        classes = {str(each["title"]): each.get("color") for each in meta["classes"]}
        colors = {name: _hex(color) for name, color in classes.items() if color}
    except _MALFORMED as error:
        problems.append(
            f"{directory / 'meta.json'}: no classes of Supervisely ({error!r})"
        )
        return None
    drawings: dict[str, Drawing] = {}
    names: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for key, image in images.items():
        path = image.parent.parent / "ann" / f"{image.name}.json"
        if not path.is_file() or (facts := _load(path, problems)) is None:
            continue
        try:
            size = _size((facts["size"]["height"], facts["size"]["width"]), image)
            shapes = [*_supervisely_shapes(facts["objects"], path, left_out)]
            drawings[key] = Drawing(size, tuple(shapes))
            names[key] = str(path)
        except _MALFORMED as error:
            problems.append(f"{path}: not an annotation of Supervisely ({error!r})")
    _note_left_out(left_out, notes)
    background = [*_BACKGROUNDS, "bg"]
    named = [name for name in classes if name.lower() not in background]
    return Annotations("Supervisely", drawings, names, named, colors)


def _supervisely_shapes(
    objects: list[dict], path: pathlib.Path, left_out: dict[str, list[str]]
) -> Iterator[Shape]:
    for each in objects:
        name, kind = str(each["classTitle"]), each.get("geometryType", "polygon")
        name = BACKGROUND if name.lower() in (*_BACKGROUNDS, "bg") else name
        if kind == "bitmap":
            x, y = each["bitmap"]["origin"]
            yield Shape(name, bitmap=each["bitmap"]["data"], corner=(x, y))
        elif kind == "polygon":
            points = each["points"]
            # Vertices are pixels here, whose centers are half a pixel further.
            rings = [points["exterior"], *points.get("interior", ())]
            shifted = tuple((np.array(ring, float) + 0.5).tolist() for ring in rings)
            yield Shape(name, shifted)
        elif kind == "rectangle":
            (x0, y0), (x1, y1) = each["points"]["exterior"]
            x1, y1 = x1 + 1, y1 + 1
            yield Shape(name, ([[x0, y0], [x1, y0], [x1, y1], [x0, y1]],))
        else:
            left_out.setdefault(kind, []).append(str(path))


def _hex(color: str) -> Color:
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue


def _is_coco(facts: Any) -> bool:
    keys = ("images", "annotations", "categories")
    return isinstance(facts, dict) and all(key in facts for key in keys)


def _coco(
    documents: dict[pathlib.Path, dict],
    images: Mapping[str, pathlib.Path],
    problems: list[str],
) -> Annotations:
    drawings: dict[str, Drawing] = {}
    names: dict[str, str] = {}
    categories: dict[int, str] = {}
    used: set[int] = set()
    by_path = {path: key for key, path in images.items()}
    by_name = layout.unique((key.rpartition("/")[2], key) for key in images)
    for path, facts in documents.items():
        absent, boxes = [], []
        try:
            categories |= {
                each["id"]: str(each["name"]) for each in facts["categories"]
            }
            shapes: dict[int, list[dict]] = {}
            called = {each["category_id"] for each in facts["annotations"]}
            if unknown := sorted(called - categories.keys()):
                problems.append(
                    f"{path}: annotations have the category_id {shorten(unknown)}, "
                    f'which "categories" lacks; add it there, or mend the annotations'
                )
                continue
            for each in facts["annotations"]:
                shapes.setdefault(each["image_id"], []).append(each)
                used.add(each["category_id"])
                if not each["segmentation"]:
                    boxes.append(each["image_id"])
            for each in facts["images"]:
                name = lists.composed(each["file_name"])
                key = by_path.get(path.parent / name) or lists.resolve(name, images)
                key = key or by_name.get(lists.strip_suffix(name.rpartition("/")[2]))
                if key is None:
                    absent.append(name)
                    continue
                size = _size((each["height"], each["width"]), images[key])
                listed = _coco_shapes(shapes.get(each["id"], []), categories)
                drawings[key] = Drawing(size, tuple(listed))
                names[key] = f"{path} ({name})"
        except _MALFORMED as error:
            problems.append(f"{path}: not a COCO file of segments ({error!r})")
        if boxes:
            problems.append(
                f"{path}: {quantity(len(boxes), 'annotation')} without an outline "
                f'("segmentation"), of the images with ids {shorten(boxes)}; draw '
                "outlines, as boxes are no masks, or remove them from it"
            )
        if absent:
            problems.append(
                f"{path}: names {quantity(len(absent), 'absent image')}: "
                f"{shorten(absent)}; add them, or remove them from it"
            )
    # Roboflow's first category is a parent of the others, without annotations.
    named = [categories[key] for key in sorted(categories) if key in used]
    named = [name for name in dict.fromkeys(named) if name not in _BACKGROUNDS]
    return Annotations("COCO", drawings, names, named)


def _coco_shapes(
    annotations: list[dict], categories: Mapping[int, str]
) -> Iterator[Shape]:
    """Yields the shapes of one image, from the largest to the smallest."""
    for each in sorted(annotations, key=lambda each: -float(each.get("area", 0))):
        name, segments = categories[each["category_id"]], each["segmentation"]
        if isinstance(segments, dict):
            yield Shape(name, runs=segments)
        else:  # Parts, which may overlap; COCO has no holes.
            for ring in segments:
                yield Shape(name, (np.reshape(ring, (-1, 2)).tolist(),))


def _size(stated: tuple[Any, Any], image: pathlib.Path) -> tuple[int, int]:
    """Returns the size that annotations state, or else the image's.

    Raises:
      ValueError: the stated size is no size.
    """
    if None in stated:
        return decode.read_header(image.read_bytes()).size
    height, width = (int(each) for each in stated)
    if min(height, width) < 1:
        raise ValueError(f"a size of {height} x {width}")
    return height, width


def _note_left_out(left_out: dict[str, list[str]], notes: list[str]) -> None:
    for kind, paths in left_out.items():
        notes.append(
            f"{quantity(len(paths), 'shape')} of type {kind!r} not drawn, in "
            f"{shorten(list(dict.fromkeys(paths)))}; only areas are labels"
        )
