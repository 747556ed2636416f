"""CDPruner (arXiv 2506.10967): tokens relevant to the question and unlike each other, by a conditional DPP.

Kernel L = diag(r) S diag(r) (eq. 8), S the cosine similarity of projected tokens, r the relevance, min-max scaled. The
set of greatest determinant is found greedily (Chen et al., 1709.05135, algorithm 1). The relevance is the cosine to
the mean of the question's own input embeddings, for which no text tower is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Inputs, Int32, Method
from localvlm.pruning.similarity import Similarity, unit_rows

__all__ = ["CDPRUNER"]

Float32 = NDArray[np.float32]
SPANNED = 1e-13
"""Share of the largest variance below which one is rounding; products of two FLOORs are just above."""
FLOOR = 1e-6
"""Least relevance: a token of relevance 0 would make every set that holds it worthless, and all such sets equal."""


def relevance(rows: Float32, text: Float32) -> Float32:
    """(n,) cosine of rows of length one to the question, scaled to FLOOR..1; all 1 where they do not differ."""
    found = rows @ unit_rows(text.mean(axis=0, keepdims=True))[0]
    low, high = found.min(), found.max()
    if high <= low:
        return np.ones(len(found), np.float32)
    return np.asarray(np.maximum((found - low) / (high - low), FLOOR), np.float32)


def greedy_map(similarity: Similarity, weight: Float32, k: int) -> list[int]:
    """Fast greedy MAP of the DPP with kernel diag(weight) similarity diag(weight): in each round the row of the
    largest conditional variance, by one row of the kernel and one column of its Cholesky factor. When nothing is left
    but what the chosen span, every set has the determinant 0, and rows are taken by weight.
    """
    left = weight.astype(np.float64) ** 2
    nothing = SPANNED * left.max()
    factor = np.zeros((k, len(weight)))
    chosen: list[int] = []
    for i in range(k):
        pick = int(left.argmax())
        if left[pick] <= nothing:
            others = np.where(np.isin(np.arange(len(weight)), chosen), -1, weight)
            return chosen + [int(j) for j in np.argsort(-others, kind="stable")[: k - i]]
        row = similarity.to(pick) * (weight * weight[pick]) - factor[:i, pick] @ factor[:i]
        factor[i] = row / np.sqrt(left[pick])
        left -= factor[i] ** 2
        left[pick] = -np.inf
        chosen.append(pick)
    return chosen


def select(inputs: Inputs, k: int) -> Int32:
    assert inputs.features is not None
    assert inputs.text is not None
    similarity = Similarity(inputs.features[inputs.candidates])
    chosen = greedy_map(similarity, relevance(similarity.rows, inputs.text), k)
    return np.sort(inputs.candidates[chosen])


CDPRUNER = Method(
    "cdpruner",
    "tokens near the question's words and unlike each other (DPP)",
    select,
    needs=frozenset({"features", "text"}),
)
