"""SGL's small-VLM-guided pruning (arXiv 2412.03324, section 3.1): keep the tokens the guide attends to most.

Ranking is joint over all tiles and pictures. ``sgl`` is the paper's plain sum of attention; ``sgl+`` gives each row of
each head a weight by how selective it is, so that diffuse rows do not drown the few that look something up.
"""

from __future__ import annotations

from localvlm.pruning.base import Inputs, Int32, Method, top

__all__ = ["SGL", "SGL_PLUS"]


def select(inputs: Inputs, k: int) -> Int32:
    assert inputs.saliency is not None
    return top(inputs.saliency, inputs.candidates, k)


SGL = Method("sgl", "the guide's attention, plainly summed (the paper)", select, "sum")
SGL_PLUS = Method("sgl+", "the guide's attention, rows weighted by selectivity", select, "selective")
