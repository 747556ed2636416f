"""FastV (arXiv 2403.06764): after the first layers, the image tokens that the last row of the prompt attends to least
leave.

Section 4.1: phi_i = mean over heads of the attention from the last token of the prompt to image token i, in layer K
counted from 1; the tokens of the lowest phi leave before the next layer, and the others keep their positions. K = 2 of
32 layers (the paper also has K = 3). The paper sets the share that leaves (0.5, 0.75); here it follows from the mean.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Kept, top
from localvlm.pruning.in_llm import Cut, InLlm, Seen, cuts_for

__all__ = ["FASTV", "attended"]

K = 2


def cuts(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:
    return cuts_for(keep, n, n_layer, (K,), lambda t: (t,))


def attended(seen: Seen, k: int) -> Kept:
    """The k tokens of the highest attention, mean over heads."""
    return Kept(top(seen.attention.mean(axis=0), np.arange(seen.attention.shape[1], dtype=np.int32), k))


FASTV = InLlm("fastv", "the last row's attention in an early layer; the rest leave after it", cuts, attended)
