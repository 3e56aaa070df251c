"""An evaluation as text."""

from collections.abc import Sequence

from mpmc_jax.evaluation import metrics
from mpmc_jax.evaluation.evaluator import EvalResult


def format_table(result: EvalResult, class_names: Sequence[str]) -> str:
    """A line a class (IoU, accuracy, labelled pixels), the means and how it was made.

    A dash stands where a figure is undefined because the class does not occur.
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
    if result.histogram is not None:
        lines += [
            _against_constant("mean average precision", scalars, "patch_map"),
            _against_constant("Hamming accuracy", scalars, "patch_hamming"),
        ]
    padding = "own size" if result.pad_to == 0 else f"padded to {result.pad_to}"
    lines.append(
        f"{result.num_images} images ({padding}), {result.programs} programs, "
        f"{result.seconds:.1f} s"
    )
    return "\n".join(lines)


def _against_constant(title: str, scalars: dict[str, float], name: str) -> str:
    return (
        f"patches, {title}: {_percent(scalars[name])} "
        f"(best constant prediction {_percent(scalars[f'{name}_constant'])})"
    )


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"
