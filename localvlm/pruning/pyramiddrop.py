"""PyramidDrop (arXiv 2410.17247): image tokens leave after a quarter, a half and three quarters of the layers.

Section 3.2: the LLM is cut into four stages of equal depth; at the end of each but the last, the share lambda of the
image tokens stays that the last row of the instruction attends to most, mean over heads. The paper has lambda = 0.5;
here it follows from the mean. The scores are the attention of the layer before the cut; the paper's code makes them
with the queries and keys of the layer behind it.
"""

from __future__ import annotations

from localvlm.pruning.fastv import attended
from localvlm.pruning.in_llm import Cut, InLlm, cuts_for

__all__ = ["PYRAMIDDROP"]

STAGES = (8, 16, 24)


def cuts(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:
    return cuts_for(keep, n, n_layer, STAGES, lambda ratio: (ratio, ratio**2, ratio**3))


PYRAMIDDROP = InLlm(
    "pyramiddrop", "the last row's attention, an equal share at each quarter of the depth", cuts, attended
)
