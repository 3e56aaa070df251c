"""Evaluation results formatted as text."""

from collections.abc import Sequence

from mpmc_jax.evaluation import metrics
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.volumes import VolumeScores
from mpmc_jax.text import quantity


def format_table(result: EvalResult, class_names: Sequence[str]) -> str:
    """Formats one line per class (IoU, accuracy, labeled pixels), means and settings.

    A dash marks a metric that is undefined because the class does not occur.
    """
    width = max(len("pixel accuracy"), *map(len, class_names))
    lines = [f"{'class':<{width}}  {'IoU':>7}  {'accuracy':>8}  {'pixels':>12}"]
    columns = (
        metrics.iou(result.confusion),
        metrics.class_accuracy(result.confusion),
        result.confusion.sum(1),
    )
    for name, iou, accuracy, pixels in zip(class_names, *columns, strict=True):
        lines.append(
            f"{name:<{width}}  {_percent(iou):>7}  {_percent(accuracy):>8}  "
            f"{pixels:>12,}"
        )
    scalars = result.scalars(class_names)
    lines += [
        f"{'mean IoU':<{width}}  {_percent(scalars['miou']):>7}",
        f"{'pixel accuracy':<{width}}  {_percent(scalars['pixel_accuracy']):>7}",
    ]
    if result.volumes is not None:
        lines += _volume_lines(result.volumes, class_names, width)
    if result.histogram is not None:
        lines += [
            _against_constant("mean average precision", scalars, "patch_map"),
            _against_constant("Hamming accuracy", scalars, "patch_hamming"),
        ]
    padding = "own size" if result.pad_to == 0 else f"padded to {result.pad_to}"
    lines.append(
        f"{quantity(result.num_images, 'image')} ({padding}), protocol "
        f"{result.protocol}, {quantity(result.programs, 'program')}, "
        f"{result.seconds:.1f} s"
    )
    return "\n".join(lines)


def _volume_lines(
    volumes: VolumeScores, class_names: Sequence[str], width: int
) -> list[str]:
    """Dice, HD95 and ASD per class, and how many volumes each mean leaves out."""
    title = quantity(len(volumes.values), "volume")
    lines = [
        f"{title:<{width}}  {'Dice':>7}  {'HD95':>8}  {'ASD':>8}  {'left out':>12}"
    ]
    rows = zip(class_names[1:], volumes.means(), volumes.undefined(), strict=True)
    for name, (dice, hd95, asd), left_out in rows:
        absent = "/".join(str(count) for count in left_out)
        lines.append(
            f"{name:<{width}}  {_percent(dice):>7}  {_voxels(hd95):>8}  "
            f"{_voxels(asd):>8}  {absent:>12}"
        )
    means = volumes.scalars(class_names)
    lines.append(
        f"{'mean':<{width}}  {_percent(means['dice']):>7}  "
        f"{_voxels(means['hd95']):>8}  {_voxels(means['asd']):>8}"
    )
    return lines


def _voxels(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"


def _against_constant(title: str, scalars: dict[str, float], name: str) -> str:
    return (
        f"patches, {title}: {_percent(scalars[name])} "
        f"(best constant prediction {_percent(scalars[f'{name}_constant'])})"
    )


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"
