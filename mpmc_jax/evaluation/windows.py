"""The windows of sliding-window evaluation, as in the published code."""

from collections.abc import Sequence

# Top, left, height and width; start and length along one axis.
Window = tuple[int, int, int, int]
Span = tuple[int, int]


def truncated_spans(side: int, size: int) -> list[Span]:
    """(start, length) along one axis; the last windows are truncated at the border.

    The stride is floor(2 size / 3). Source: UniMatch, supervised.py; AugSeg,
    train_semi.py.
    """
    stride = max(2 * size // 3, 1)
    return [(start, min(size, side - start)) for start in range(0, side, stride)]


def shifted_spans(side: int, size: int) -> list[Span]:
    """(start, length) along one axis; the last window is shifted back to the border.

    The stride is ceil(2 size / 3); a side below `size` has one window. Source: U2PL and
    AEL, eval.py.
    """
    stride = -(-2 * size // 3)
    last = max(side - size, 0)
    number = -(-last // stride) + 1
    return [(min(i * stride, last), min(size, side)) for i in range(number)]


def windows(rows: Sequence[Span], columns: Sequence[Span]) -> list[Window]:
    """The windows of an image, row by row."""
    return [
        (top, left, height, width) for top, height in rows for left, width in columns
    ]
