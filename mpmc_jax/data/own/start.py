"""Writes what a user's folder lacks: classes.json, unlabeled.txt and config.py."""

import ast
import collections
import dataclasses
import json
import math
import pathlib
import shlex
import statistics

from mpmc_jax.data import check, decode
from mpmc_jax.data.builders import folder
from mpmc_jax.data.own import survey
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Source, read_original
from mpmc_jax.text import printable, quantity, shorten

_CROP = 321  # That of VOC and of configs/folder.py.
# Larger images are evaluated in windows.
_LONGEST_WHOLE = 2048
# More sizes of images than this are padded to common ones.
_FEW_SIZES = 8
_LEAST_PADDING, _MOST_PADDING = 16, 128
_SAMPLED = 200
# A class with a smaller share of the pixels is rare.
_RARE = 0.01

_CONFIG = '''"""Trains on the images of {directory}; written once, yours to change.

{command}

{found}
"""

from configs import base, presets


def get_config(argument=""):
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "folder"
    config.data.data_dir = {data_dir}
    # "full" uses every mask, "1_8" an eighth of them and "30" thirty of them; the
    # other images are then unlabeled.
    config.data.split = "full"
    # Side of the square training crops; the images' short side is {short} pixels.
    config.data.crop = {crop}
    # Labeled images per step, and as many unlabeled ones. Less needs less memory.
    config.train.batch_size = 8
    # Passes over the unlabeled images, here about {steps} steps; config.train.steps
    # sets their number directly.
    config.train.epochs = 80
{more}    config.model.backbone = "resnet50"
    # For a first try without a GPU or TPU, remove the "# " of these lines:
    # config.model.backbone, config.data.crop = "resnet18", {small_crop}
    # config.train.batch_size, config.train.steps = 2, 200
    # config.optimizer.lr, config.optimizer.head_multiplier = 0.02, 1.0
    # config.train.precise_bn = 10
    return presets.apply(config, f"method=unimatch,mpmc=recommended,{{argument}}")
'''


@dataclasses.dataclass(frozen=True)
class Told:
    """What a function of this module tells the user.

    Attributes:
      lines: what was found or written, one line each.
      warnings: what may be a mistake, one line each.
    """

    lines: list[str]
    warnings: tuple[str, ...] = ()


def write_classes(directory: pathlib.Path, names: tuple[str, ...] = ()) -> Told:
    """Writes classes.json unless it exists; returns what was found.

    Args:
      directory: the user's folder.
      names: class names instead of the proposed ones; () for these.

    Raises:
      ValueError: no masks are found, they do not agree, or `names` has another length.
      OSError: the file cannot be written.
    """
    path = directory / "classes.json"
    if path.exists():
        if names:
            raise ValueError(f"--classes: {path} exists; change the names there")
        return Told([f"{path} exists and is used"])
    problems: list[str] = []
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    named_in = None
    found = folder.open_folder(directory, problems, [])
    if found.annotations is not None and found.annotations.drawings:
        facts: dict = {"classes": list(found.annotations.class_names)}
        if palette := found.annotations.palette():
            facts["palette"] = [list(color) for color in palette]
    elif problems:
        raise ValueError("\n".join(problems))
    else:
        proposal = survey.propose(directory, found.layout.masks, use_lists=not names)
        facts, remarks = proposal.facts, proposal.remarks
        warnings, named_in = proposal.warnings, proposal.named_in
    if names:
        if len(names) != len(facts["classes"]):
            raise ValueError(
                f"--classes={','.join(names)}: {quantity(len(names), 'name')} for "
                f"{quantity(len(facts['classes']), 'class')}: "
                f"{shorten(facts['classes'], 12)}"
            )
        facts["classes"] = list(names)
    elif named_in is not None:
        remarks += (f"class names are those of {named_in}",)
    with path.open("x", encoding="utf-8") as file:
        file.write(_as_json(facts))
    shown = facts["classes"]
    if "palette" in facts:
        colors = map(tuple, facts["palette"])
        shown = [f"{name} {color}" for name, color in zip(shown, colors, strict=True)]
    classes = shorten(shown, 12)
    written = f"{path} written, with the classes {classes}: rename them there"
    return Told([*remarks, written], warnings)


def write_unlabeled(directory: pathlib.Path, more: str = "") -> list[str]:
    """Writes unlabeled.txt if it is missing and some images have no masks.

    Masks without an image are left to `check`: there may be more that do not match.

    Args:
      directory: the user's folder.
      more: see `folder.find_unlabeled`; the list has these images too.

    Returns:
      What was written, one line each.

    Raises:
      OSError: the file cannot be written.
    """
    path = directory / "unlabeled.txt"
    found = folder.open_folder(directory, [], [])
    images, masks = found.layout.images, found.layout.masks
    without = sorted(images.keys() - masks.keys())
    if path.exists() or not masks or not without or masks.keys() - images.keys():
        return []
    others = folder.find_unlabeled(directory, more, found, [], [])
    with path.open("x", encoding="utf-8") as file:
        file.writelines(f"{key}\n" for key in [*without, *others])
    count = quantity(len(without), "image")
    return [f"{path} written, with {count} without a mask: {shorten(without)}"]


def _as_json(facts: dict) -> str:
    """Formats classes.json with one key per line."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in facts.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_config(
    source: Source, report: check.Report, directory: pathlib.Path, data_dir: str
) -> list[str]:
    """Writes config.py unless it exists; returns what to do next, one line each.

    Args:
      source: the user's folder.
      report: the result of checking it.
      directory: that folder, where the file is written.
      data_dir: where the prepared data set is.

    Raises:
      OSError: the file cannot be written.
    """
    path = directory / "config.py"
    if path.exists():
        return _keep(path, data_dir)
    command = _command(path)
    labeled = sum(sample.mask is not None for sample in source.splits["train"])
    unlabeled = len(source.splits["train"]) - labeled
    sizes = _sizes(source)
    short = round(statistics.median(min(size) for size in sizes)) if sizes else _CROP
    crop = min(_CROP, max(33, short // 32 * 32 + 1))
    # With split="full" labeled images are in the unlabeled list too.
    steps = -(-(labeled + unlabeled) // 8) * 80
    found = (
        f"{quantity(labeled, 'labeled image')}, {unlabeled} unlabeled, "
        f"{len(source.splits['val'])} for validation; "
        f"{check.describe(source.pixels)}.\n"
        f"Classes: {', '.join(map(printable, source.class_names))}."
    )
    text = _CONFIG.format(
        directory=_quoted(str(directory)),
        command=_quoted(command),
        found=_quoted(found),
        data_dir=json.dumps(str(pathlib.Path(data_dir).resolve())),
        short=short,
        crop=crop,
        small_crop=min(97, crop),
        steps=steps,
        more="".join(f"    {line}\n" for line in _settings(source, report, sizes)),
    )
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return [f"{path} written", f"Train with: {command}"]


def _command(config: pathlib.Path, data_dir: str = "") -> str:
    """Returns the command that trains with a configuration beside the images.

    Args:
      config: the configuration.
      data_dir: where the prepared data set is; "" if the configuration says so.
    """
    name = config.parent.resolve().name
    options = {"--config": str(config), "--workdir": f"runs/{name}"}
    if data_dir:  # Another data set than that of the run in the usual workdir.
        options["--workdir"] += f"_{pathlib.Path(data_dir).name}"
        options["--config.data.data_dir"] = data_dir
    words = [f"{option}={shlex.quote(value)}" for option, value in options.items()]
    return " ".join(["python -m launch.train", *words])


def _keep(path: pathlib.Path, data_dir: str) -> list[str]:
    """Returns how to train the data just prepared with a config.py that was there."""
    kept = f"{path} exists and is kept"
    prepared = str(pathlib.Path(data_dir).resolve())
    named = _named_data_dir(path)
    if named and str(pathlib.Path(named).resolve()) == prepared:
        return [kept, f"Train with: {_command(path)}"]
    other = f"names data_dir={named}" if named else "does not show its data_dir"
    return [
        f"warning: {kept}, and it {other}; the data just prepared are in {prepared}: "
        "give --config.data.data_dir as below, or change the file",
        f"Train with: {_command(path, prepared)}",
    ]


def _named_data_dir(path: pathlib.Path) -> str | None:
    """Returns the text that a configuration assigns to data_dir, if it shows one."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    except (ValueError, SyntaxError, OSError):
        return None
    for node in nodes:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and ast.unparse(node.targets[0]).endswith(".data_dir")
        ):
            return node.value.value
    return None


def _quoted(text: str) -> str:
    """Makes a text safe in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _sizes(source: Source) -> list[tuple[int, int]]:
    """Returns the sizes of the first images."""
    sizes = []
    for split in source.splits.values():
        for sample in split[:_SAMPLED]:
            try:
                sizes.append(decode.read_header(read_original(sample.image)).size)
            except (UnreadableImage, OSError):
                continue  # `check` has reported it.
    return sizes


def _settings(
    source: Source, report: check.Report, sizes: list[tuple[int, int]]
) -> list[str]:
    """Returns settings that only some data sets need, with their reasons."""
    lines = []
    if max((max(size) for size in sizes), default=0) > _LONGEST_WHOLE:
        lines += [
            "# Large images are evaluated in windows of the crop's size.",
            'config.eval.protocol = "slide_unimatch"',
        ]
    elif len(collections.Counter(sizes)) > _FEW_SIZES:
        lines += [
            "# Images of many sizes are padded to multiples of this in training's",
            "# evaluations, for which fewer programs are compiled; 0 is exact.",
            f"config.eval.pad_to = {_padding(sizes)}",
        ]
    trained = [sample.id for sample in source.splits["train"]]
    seen = {label for key in trained for label in report.present.get(key, ())}
    absent = [n for i, n in enumerate(source.class_names) if i not in seen]
    if absent:
        lines += [
            f"# No training mask holds {shorten(absent)}.",
            "config.data.allow_absent_classes = True",
        ]
    lines += _imbalance(source, report)
    if source.pixels.channels == 3 and decode.is_picture(source.pixels):
        lines += [
            "# Pretrained weights make the largest difference, see",
            "# docs/choosing_a_method.md; for instance, in the argument,",
            "# method=unimatch_v2,backbone=dinov2_s14, and",
            '# config.model.pretrained = "dinov2_s14"',
        ]
    return lines


def _padding(sizes: list[tuple[int, int]]) -> int:
    """Returns a power of two, at most a fourth of most images' short sides."""
    short = statistics.median(map(min, sizes))
    return max(_LEAST_PADDING, min(_MOST_PADDING, 2 ** int(math.log2(short / 4))))


def _imbalance(source: Source, report: check.Report) -> list[str]:
    """Returns a comment about rare classes, or []."""
    counts = report.pixels[: len(source.class_names)]
    shares = counts / max(counts.sum(), 1)
    rare = [
        f"{name} {share:.2%}"
        for name, share in zip(source.class_names, shares, strict=True)
        if 0 < share < _RARE
    ]
    if not rare:
        return []
    numbers = tuple(i for i, share in enumerate(shares) if 0 < share < _RARE)
    return [
        f"# Rare classes, of the pixels: {shorten(rare)}.",
        "# Dice gives them more weight than cross-entropy alone, and crops can be",
        "# centered on them; remove the first # of these lines:",
        '# config.method.supervised_loss = "ce_dice"',
        "# config.imbalance.crop_probability = 0.5",
        f"# config.imbalance.crop_classes = {numbers}",
    ]
