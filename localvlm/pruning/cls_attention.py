"""Methods that keep what the vision tower itself looks at, blind to the question.

``fastervlm``: FasterVLM (arXiv 2412.01818 v1, eq. 3), the attention of the block whose output feeds the projector. Each
tile has a budget of its own, as the paper has it for LLaVA-NeXT. Towers without [CLS]: the attention received.

``vtc-cls``: VTC-CLS (arXiv 2412.05819, eq. 4), the sum over the blocks from START on, joint over tiles.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Method, shares, top

__all__ = ["FASTERVLM", "VTC_CLS"]

START = 0.5
"""Share of the blocks that VTC-CLS leaves out, the first ones."""


def fastervlm(inputs: Inputs, k: int) -> Int32:
    assert inputs.tower is not None
    tile = np.zeros(inputs.n, np.int32) if inputs.tiles is None else inputs.tiles
    groups = [inputs.candidates[tile[inputs.candidates] == t] for t in np.unique(tile[inputs.candidates])]
    budgets = shares(k, [len(group) for group in groups])
    kept = [top(inputs.tower[-1], group, n) for group, n in zip(groups, budgets, strict=True)]
    return np.sort(np.concatenate(kept)).astype(np.int32)


def vtc_cls(inputs: Inputs, k: int) -> Int32:
    assert inputs.tower is not None
    first = min(int(START * len(inputs.tower)), len(inputs.tower) - 1)
    return top(inputs.tower[first:].sum(axis=0), inputs.candidates, k)


FASTERVLM = Method("fastervlm", "what the vision tower's last block looks at", fastervlm, needs=frozenset({"tower"}))
VTC_CLS = Method("vtc-cls", "what the vision tower's later blocks look at", vtc_cls, needs=frozenset({"tower"}))
