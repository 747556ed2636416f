"""From a guide's attention to one score per image token, and from its token grid to another's.

SGL (arXiv 2412.03324), section 3.1: the score of an image token is the attention it receives, summed over all layers,
heads, prompt tokens after the image and generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Attention

__all__ = ["AGGREGATIONS", "resample"]

Float32 = NDArray[np.float32]


def plain_sum(a: Attention) -> Float32:
    """SGL eq. 3: A = A^P + A^D, raw sums with equal weights."""
    return np.asarray((a.prompt + a.generated).sum(axis=(0, 1)), np.float32)


def last_row(a: Attention) -> Float32:
    """Attention of the last prompt row alone, summed over layers and heads (an ablation of the paper)."""
    return np.asarray(a.last.sum(axis=(0, 1)), np.float32)


def selective(a: Attention) -> Float32:
    """Rows weighted by (1 - entropy / log N)^2, each layer, head and row apart: diffuse rows count for little."""
    prompt, generated, _ = _need(a.weighted)
    return np.asarray((prompt + generated).sum(axis=(0, 1)), np.float32)


def maximum(a: Attention) -> Float32:
    """Largest attention over rows, layers and heads."""
    prompt, generated, _ = _need(a.maximum)
    return np.asarray(np.maximum(prompt, generated).max(axis=(0, 1)), np.float32)


def _need(arrays: tuple[Float32, Float32, Float32] | None) -> tuple[Float32, Float32, Float32]:
    if arrays is None:
        raise ValueError("this aggregation needs all reductions of the tap")
    return arrays


AGGREGATIONS: dict[str, Callable[[Attention], Float32]] = {
    "sum": plain_sum,
    "last": last_row,
    "selective": selective,
    "max": maximum,
}


def resample(scores: Float32, source: Float32, target: Float32) -> Float32:
    """Moves scores from one set of boxes to another by the area they share in the picture.

    Boxes may overlap, as those of an overview and of the tiles that show the same again. Each source token spreads its
    mass evenly over its box, and masses of one place add up. What lies at a place is split evenly among the target
    tokens that show it, so that nothing is counted twice. Equal boxes are taken over one by one: a guide that looks at
    the overview and not at a tile means just that.

    Args:
        scores: (m,) mass of each source token; what lies on empty boxes (padding) is lost.
        source: (m, 4) boxes x0, y0, x1, y1 in pixels of the picture.
        target: (n, 4) boxes in pixels of the same picture.

    Returns:
        (n,) mass per target token; the total, and that of every region, is kept where the target covers the source.
    """
    if source.shape == target.shape and np.array_equal(source, target):
        return scores
    xs, ys = (np.unique(np.concatenate([b[:, a::2].ravel() for b in (source, target)])) for a in (0, 1))
    from_cells, to_cells = (_corners(b, xs, ys) for b in (source, target))
    area = ((source[:, 2:] - source[:, :2]).astype(np.float64)).prod(axis=1)
    density = _added(from_cells, np.divide(scores, area, out=np.zeros(len(area)), where=area > 0), xs, ys)
    layers = _added(to_cells, np.ones(len(target)), xs, ys)
    mass = density * np.outer(np.diff(ys), np.diff(xs)) / np.maximum(np.rint(layers), 1)
    total = np.zeros((len(ys), len(xs)))
    total[1:, 1:] = mass.cumsum(axis=0).cumsum(axis=1)
    x0, y0, x1, y1 = to_cells
    sums = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.maximum(sums, 0).astype(np.float32)


def _corners(boxes: Float32, xs: Float32, ys: Float32) -> tuple[NDArray[np.intp], ...]:
    """x0, y0, x1, y1 of boxes as indices of the edges ``xs`` and ``ys``."""
    return tuple(np.searchsorted(edges, boxes[:, i]) for i, edges in enumerate((xs, ys, xs, ys)))


def _added(
    corners: tuple[NDArray[np.intp], ...], values: NDArray[np.float64], xs: Float32, ys: Float32
) -> NDArray[np.float64]:
    """(len(ys) - 1, len(xs) - 1): for each cell between edges the sum of the values of the boxes that cover it."""
    x0, y0, x1, y1 = corners
    steps = np.zeros((len(ys), len(xs)))
    for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(steps, (y, x), sign * values)
    return np.asarray(steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1])
