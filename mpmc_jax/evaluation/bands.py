"""Scores of images too large for one pass: overlapping windows, band by band.

Memory holds the scores of one row of windows, never those of the whole image. Rows of
the image are finished, and handed out, as soon as no further window covers them.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from mpmc_jax.evaluation.protocols import Slide

# The scores of stored windows: (b,h,w,c) -> (b,h,w,C).
ScoreFn = Callable[[np.ndarray], np.ndarray]


def scores_by_band(
    protocol: Slide,
    score: ScoreFn,
    image: np.ndarray,
    num_classes: int,
    batch_size: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first row of each band, and its averaged scores (rows,w,C).

    The scores are a view that the next band overwrites.

    Args:
      protocol: places the windows.
      score: computes the scores of windows of one size.
      image: (h,w,c) as stored.
      num_classes: C.
      batch_size: windows per call of `score`.
    """
    rows, columns = image.shape[:2]
    spans = protocol.spans(rows)
    tallest = max(height for _, height in spans)
    total = np.zeros((tallest, columns, num_classes), np.float32)
    count = np.zeros((tallest, columns, 1), np.float32)
    ends = [top for top, _ in spans[1:]] + [rows]
    for (top, height), end in zip(spans, ends, strict=True):
        strip = image[top : top + height]
        for left, found in _row_of_windows(protocol, score, strip, batch_size):
            columns_of_window = slice(left, left + found.shape[1])
            total[:height, columns_of_window] += found
            count[:height, columns_of_window] += 1
        done = end - top
        total[:done] /= count[:done]
        yield top, total[:done]
        for array in (total, count):
            # Row by row: NumPy would copy all of overlapping arrays.
            for row in range(tallest - done):
                array[row] = array[row + done]
            array[tallest - done :] = 0


def _row_of_windows(
    protocol: Slide, score: ScoreFn, strip: np.ndarray, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the left column and the scores (h,w,C) of every window of a strip."""
    spans = protocol.spans(strip.shape[1])
    for width, same in itertools.groupby(spans, key=lambda span: span[1]):
        lefts = [left for left, _ in same]
        for start in range(0, len(lefts), batch_size):
            batch = lefts[start : start + batch_size]
            windows = np.stack([strip[:, left : left + width] for left in batch])
            yield from zip(batch, score(windows), strict=True)
