"""SCOPE (arXiv 2510.24214): saliency times the coverage that a token adds, greedily.

Coverage of a set S (facility location): sum over all tokens u of C(u), the largest cosine of u to a token of S, at
least 0. In each round the token v of the largest saliency(v) * (coverage(S + v) - coverage(S)) is taken. Gains only
fall as S grows, so a token whose old gain is below the best fresh one need not be looked at (lazy greedy: the same
choice as without).
"""

from __future__ import annotations

import heapq

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Method
from localvlm.pruning.similarity import unit_rows

__all__ = ["SCOPE"]


def select(inputs: Inputs, k: int) -> Int32:
    """Ties go to the earlier token."""
    assert inputs.features is not None
    assert inputs.tower is not None
    rows = unit_rows(inputs.features[inputs.candidates])
    weight = inputs.tower[-1][inputs.candidates].astype(np.float64)
    similar = np.maximum(rows @ rows.T, 0)
    covered = np.zeros(len(rows), np.float32)
    queue = [(-g, i, 0) for i, g in enumerate(weight * similar.sum(axis=1, dtype=np.float64))]
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < k:
        _, i, seen = heapq.heappop(queue)
        if seen == len(chosen):
            chosen.append(i)
            np.maximum(covered, similar[i], out=covered)
            continue
        fresh = weight[i] * float(np.maximum(similar[i] - covered, 0).sum(dtype=np.float64))
        heapq.heappush(queue, (-fresh, i, len(chosen)))
    return np.sort(inputs.candidates[chosen])


SCOPE = Method(
    "scope",
    "vision attention times what a token adds to the coverage of all",
    select,
    needs=frozenset({"features", "tower"}),
)
