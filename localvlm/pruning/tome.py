"""ToMe (arXiv 2210.09461): similar tokens are averaged, blind to the question.

Bipartite soft matching (section 3): the tokens are split in turn into A and B, each of A looks for the most similar of
B, and the r closest pairs become one token, averaged by how many tokens each stands for; again and again until k are
left, half of them at most in one round. The paper merges in every block of the tower; here, as in the tables that
compare methods for VLMs, the projected rows are merged before the LLM. A merged token stands in its partner's place.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Kept, Method
from localvlm.pruning.similarity import unit_rows

__all__ = ["TOME"]


def average(inputs: Inputs, k: int) -> Kept:
    assert inputs.features is not None
    index, rows = inputs.candidates, inputs.features[inputs.candidates].astype(np.float32, copy=False)
    size = np.ones(len(rows), np.float32)
    while len(rows) > k:
        unit = unit_rows(rows)
        similar = unit[::2] @ unit[1::2].T
        closest = np.argsort(-similar.max(axis=1), kind="stable")[: min(len(rows) - k, len(similar))]
        leaving, partner = 2 * closest, 2 * similar[closest].argmax(axis=1) + 1
        rows *= size[:, None]
        for gone, into in zip(leaving, partner, strict=True):  # np.add.at takes longer, and np.add.reduceat
            rows[into] += rows[gone]
            size[into] += size[gone]
        rows /= size[:, None]
        stays = np.ones(len(rows), bool)
        stays[leaving] = False
        index, rows, size = index[stays], rows[stays], size[stays]
    return Kept(index, rows)


def select(inputs: Inputs, k: int) -> Int32:
    return average(inputs, k).index


TOME = Method(
    "tome",
    "similar tokens averaged (bipartite matching), blind to the question",
    select,
    needs=frozenset({"features"}),
    average=average,
)
