"""VisPruner (arXiv 2412.01818 v2): half of the tokens by the tower's attention, half by being unlike each other.

The most attended tokens are kept (section 3.2). Of the rest, in order of attention, the halves of even and odd rank
are compared, and the STEP even-ranked tokens most similar to an odd-ranked one leave, again and again (section 3.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Inputs, Int32, Method
from localvlm.pruning.similarity import unit_rows

__all__ = ["VISPRUNER"]

Float32 = NDArray[np.float32]
Intp = NDArray[np.intp]

IMPORTANT = 0.5
"""Share kept by attention (the paper's default)."""
STEP = 8
"""Duplicates removed in one round."""
NEAREST = 16
"""Most similar tokens that are listed for each: nearly always one of them is of the other half."""


def select(inputs: Inputs, k: int) -> Int32:
    assert inputs.features is not None
    assert inputs.tower is not None
    score = inputs.tower[-1][inputs.candidates]
    order = np.argsort(-score, kind="stable")
    important = round(IMPORTANT * k)
    rows = unit_rows(inputs.features[inputs.candidates[order[important:]]])
    unlike = order[important:][_unlike(rows @ rows.T, k - important)]
    return np.sort(inputs.candidates[np.concatenate([order[:important], unlike])])


def _unlike(similar: Float32, k: int) -> Intp:
    """Picks k of the rows of a matrix of cosines, which are in order of attention.

    The tokens most similar to each are listed, and listed anew whenever half of the rows have left: as the list holds
    the largest cosines, the largest of those of odd rank in it is the one sought.
    """
    rest = np.arange(len(similar))
    while len(rest) > k:
        nearest = np.argpartition(similar, -min(NEAREST, len(rest)), axis=1)[:, -NEAREST:]
        alike = np.ascontiguousarray(np.take_along_axis(similar, nearest, axis=1).T)
        nearest = np.ascontiguousarray(nearest.T)
        place = np.arange(len(rest))
        while len(place) > max(k, len(rest) // 2):
            even, odd = place[::2], place[1::2]
            out = np.full(len(rest), -3, np.float32)  # takes a cosine below all others
            out[odd] = 0
            closest = (alike[:, even] + out[nearest[:, even]]).max(axis=0)
            far = np.flatnonzero(closest < -1.5)  # none of those listed is of odd rank
            closest[far] = similar[np.ix_(even[far], odd)].max(axis=1, initial=-1)
            leaving = min(STEP, len(place) - k)
            place = np.concatenate([even[np.argsort(-closest, kind="stable")[leaving:]], odd])
        rest, similar = rest[place], similar[np.ix_(place, place)]
    return rest


VISPRUNER = Method(
    "vispruner",
    "vision attention for one half, unlike tokens for the other",
    select,
    needs=frozenset({"features", "tower"}),
)
