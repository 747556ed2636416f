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
    """Moves scores from one token grid to another by the area their boxes share in the picture.

    Args:
        scores: (m,) mass of each source token, spread evenly over its box.
        source: (m, 4) boxes x0, y0, x1, y1 in pixels of the picture.
        target: (n, 4) boxes in pixels of the same picture.

    Returns:
        (n,) mass per target token; the total is kept where the target covers the source.
    """
    if source.shape == target.shape and np.array_equal(source, target):
        return scores
    width = np.minimum(source[:, None, 2], target[None, :, 2]) - np.maximum(source[:, None, 0], target[None, :, 0])
    height = np.minimum(source[:, None, 3], target[None, :, 3]) - np.maximum(source[:, None, 1], target[None, :, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    area = (source[:, 2] - source[:, 0]) * (source[:, 3] - source[:, 1])
    density = np.divide(scores, area, out=np.zeros_like(scores), where=area > 0)
    return np.asarray(density @ shared, np.float32)
