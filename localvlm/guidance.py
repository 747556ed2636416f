"""From a guide's attention to one score per image token, and from its token grid to another's.

SGL (arXiv 2412.03324), section 3.1: the score of an image token is the attention it receives, summed over all layers,
heads, prompt tokens after the image and generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Attention
from localvlm.pruning.similarity import unit_rows

__all__ = ["AGGREGATIONS", "carried", "resample", "spread", "stand_ins"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]


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


def stand_ins(features: Float32, seen: Int32) -> tuple[Int32, Float32]:
    """For tokens that were not shown, those that were.

    Args:
        features: (n, d) of all tokens.
        seen: (k,) indices of those shown.

    Returns:
        (n,) the token seen that each is most similar to, itself if it is one; and (n,) their cosine, at least 0.
    """
    unit = unit_rows(features)
    similar = unit @ unit[seen].T
    nearest, cosine = seen[similar.argmax(axis=1)], similar.max(axis=1).clip(0, 1)
    nearest[seen], cosine[seen] = seen, 1
    return nearest.astype(np.int32), cosine.astype(np.float32)


def carried(a: Attention, of: Int32, share: Float32) -> Attention:
    """The same attention, where each image token has the ``share`` (n,) of what token ``of`` (n,) got."""

    def of_all(got: Float32) -> Float32:
        return np.asarray(got[..., of] * share, np.float32)

    def of_three(got: tuple[Float32, Float32, Float32] | None) -> tuple[Float32, Float32, Float32] | None:
        return None if got is None else (of_all(got[0]), of_all(got[1]), of_all(got[2]))

    return replace(
        a,
        prompt=of_all(a.prompt),
        generated=of_all(a.generated),
        last=of_all(a.last),
        weighted=of_three(a.weighted),
        maximum=of_three(a.maximum),
    )


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
    plane = _Plane(source, target)
    layers = plane.added(target, np.ones(len(target)))
    return plane.sums(plane.density(scores, source) / np.maximum(np.rint(layers), 1), target).astype(np.float32)


def spread(scores: Float32, source: Float32, target: Float32) -> Float32:
    """Scores of other boxes, to choose tokens by: what a token of the target's mean size would get at their place.

    By mass (:func:`resample`) a token scores the more the larger it is, though it costs as much as a small one, so that
    all of an overview would come before any tile. By density an overview and the tiles below it are equal wherever the
    guide cannot tell them apart, and where it can, the tokens that lie within what it looked at come first. Equal
    boxes are taken over one by one.

    Args and shapes are those of :func:`resample`; tokens on empty boxes score 0.
    """
    if source.shape == target.shape and np.array_equal(source, target):
        return scores
    plane, area = _Plane(source, target), _areas(target)
    mass = plane.sums(plane.density(scores, source), target)
    mean = area[area > 0].mean() if area.any() else 0.0
    return np.divide(mass * mean, area, out=np.zeros(len(area)), where=area > 0).astype(np.float32)


def _areas(boxes: Float32) -> Float64:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(axis=1))


class _Plane:
    """The picture cut into cells at all edges of two sets of boxes."""

    def __init__(self, *boxes: Float32) -> None:
        self._edges = [np.unique(np.concatenate([b[:, a::2].ravel() for b in boxes])) for a in (0, 1)]

    def _corners(self, boxes: Float32) -> tuple[NDArray[np.intp], ...]:
        """x0, y0, x1, y1 as indices of edges."""
        xs, ys = self._edges
        return tuple(np.searchsorted(edges, boxes[:, i]) for i, edges in enumerate((xs, ys, xs, ys)))

    def added(self, boxes: Float32, values: Float64) -> Float64:
        """(rows, columns) for each cell the sum of the values of the boxes that cover it."""
        x0, y0, x1, y1 = self._corners(boxes)
        xs, ys = self._edges
        steps = np.zeros((len(ys), len(xs)))
        for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            np.add.at(steps, (y, x), sign * values)
        return np.asarray(steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1])

    def density(self, mass: Float32, boxes: Float32) -> Float64:
        """(rows, columns) mass per pixel, where each box spreads its own evenly."""
        area = _areas(boxes)
        return self.added(boxes, np.divide(mass, area, out=np.zeros(len(area)), where=area > 0))

    def sums(self, density: Float64, boxes: Float32) -> Float64:
        """(n,) what lies in each box."""
        xs, ys = self._edges
        total = np.zeros((len(ys), len(xs)))
        total[1:, 1:] = (density * np.outer(np.diff(ys), np.diff(xs))).cumsum(axis=0).cumsum(axis=1)
        x0, y0, x1, y1 = self._corners(boxes)
        return np.maximum(total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0], 0)
