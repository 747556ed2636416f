"""VisPruner (arXiv 2412.01818 v2): half of the tokens by the tower's attention, half by being unlike each other.

The most attended tokens are kept (section 3.2). Of the rest, in order of attention, the halves of even and odd rank
are compared, and the STEP even-ranked tokens most similar to an odd-ranked one leave, again and again (section 3.3).
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Method
from localvlm.pruning.similarity import unit_rows

__all__ = ["VISPRUNER"]

IMPORTANT = 0.5
"""Share kept by attention (the paper's default)."""
STEP = 8
"""Duplicates removed in one round."""


def select(inputs: Inputs, k: int) -> Int32:
    assert inputs.features is not None
    assert inputs.tower is not None
    score = inputs.tower[-1][inputs.candidates]
    order = np.argsort(-score, kind="stable")
    important = round(IMPORTANT * k)
    rest = order[important:]
    rows = unit_rows(inputs.features[inputs.candidates])
    similar = rows @ rows.T
    while len(rest) > k - important:
        even, odd = rest[::2], rest[1::2]
        leaving = min(STEP, len(rest) - (k - important))
        closest = similar[np.ix_(even, odd)].max(axis=1, initial=-1)
        rest = np.concatenate([even[np.argsort(-closest, kind="stable")[leaving:]], odd])
    return np.sort(inputs.candidates[np.concatenate([order[:important], rest])])


VISPRUNER = Method(
    "vispruner",
    "vision attention for one half, unlike tokens for the other",
    select,
    needs=frozenset({"features", "tower"}),
)
