"""SGL's small-VLM-guided pruning (arXiv 2412.03324, section 3.1): keep the tokens the guide attends to most.

Ranking is joint over all tiles and pictures (:mod:`localvlm.pruning.joint`). ``sgl`` is the paper's plain sum of
attention; ``sgl+`` gives each row of each head a weight by how selective it is, so that diffuse rows do not drown the
few that look something up.
"""

from __future__ import annotations

from localvlm.pruning.base import Method
from localvlm.pruning.joint import best

__all__ = ["SGL", "SGL_PLUS"]

SGL = Method("sgl", "the guide's attention, plainly summed (the paper)", best, "sum")
SGL_PLUS = Method("sgl+", "the guide's attention, rows weighted by selectivity", best, "selective")
