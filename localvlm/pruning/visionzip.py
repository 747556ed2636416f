"""VisionZip (arXiv 2412.04467): the tokens that the vision tower looks at, and a few that stand for the rest.

Dominant tokens have the most attention in the block whose output feeds the projector (section 3.2). Of the rest, evenly
spaced ones become contextual tokens: each of the others joins the one it is most similar to, and they are averaged
(section 3.3, algorithm 1). The paper compares keys of the tower and averages its output; here both are done with the
projected rows.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Kept, Method
from localvlm.pruning.similarity import unit_rows

__all__ = ["VISIONZIP"]

CONTEXTUAL = 10 / 64
"""Share of the kept tokens that stand for others (the paper: 10 of 64, 20 of 128, 30 of 192)."""


def average(inputs: Inputs, k: int) -> Kept:
    assert inputs.features is not None
    assert inputs.tower is not None
    rows = inputs.features[inputs.candidates].astype(np.float32)
    order = np.argsort(-inputs.tower[-1][inputs.candidates], kind="stable")
    contextual = round(CONTEXTUAL * k) if len(rows) > k else 0
    dominant, rest = np.sort(order[: k - contextual]), np.sort(order[k - contextual :])
    if contextual:
        target = rest[np.arange(contextual) * len(rest) // contextual]
        others = np.setdiff1d(rest, target)
        unit = unit_rows(rows)
        joins = target[(unit[others] @ unit[target].T).argmax(axis=1)]
        count = np.bincount(joins, minlength=len(rows))
        np.add.at(rows, joins, inputs.features[inputs.candidates[others]])
        rows /= 1 + count[:, None]
        dominant = np.sort(np.concatenate([dominant, target]))
    return Kept(inputs.candidates[dominant], rows[dominant])


def select(inputs: Inputs, k: int) -> Int32:
    return average(inputs, k).index


VISIONZIP = Method(
    "visionzip",
    "vision attention, and averages that stand for the rest",
    select,
    needs=frozenset({"features", "tower"}),
    average=average,
)
