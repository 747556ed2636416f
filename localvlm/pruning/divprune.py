"""DivPrune (arXiv 2503.02175): the tokens that lie farthest apart, blind to the question.

Max-min diversity (eq. 3-5) with the distance 1 - cos of projected tokens, greedily: first the token whose nearest
other is farthest, then each time the token whose nearest chosen one is farthest.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Method
from localvlm.pruning.similarity import Similarity

__all__ = ["DIVPRUNE"]


def select(inputs: Inputs, k: int) -> Int32:
    """Ties go to the earlier token."""
    assert inputs.features is not None
    similarity = Similarity(inputs.features[inputs.candidates])
    chosen = [_loneliest(similarity)]
    nearest = similarity.to(chosen[0]).copy()  # to the nearest chosen token
    while len(chosen) < k:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
        np.maximum(nearest, similarity.to(chosen[-1]), out=nearest)
    return np.sort(inputs.candidates[chosen])


def _loneliest(similarity: Similarity) -> int:
    """The row least similar to the one most similar to it."""
    most = np.empty(len(similarity.rows), np.float32)
    for start, block in similarity.blocks():
        others = block.copy()
        np.fill_diagonal(others[:, start:], -np.inf)
        most[start : start + len(block)] = others.max(axis=1)
    return int(most.argmin())


DIVPRUNE = Method(
    "divprune",
    "tokens farthest apart in the model's own features, blind to the question",
    select,
    needs=frozenset({"features"}),
)
