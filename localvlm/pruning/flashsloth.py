"""FlashSloth (arXiv 2412.04317): the tokens of each region averaged by learnt weights, blind to the question. Trained.

Section 3.2, spatial attention pooling: a region of ``side`` x ``side`` tokens x becomes

    sum_i softmax(down gelu(up x))_i x_i

the softmax over the region. Here x are the projector's rows (normed before ``up``), and the LLM's weights are not
trained. The row of a region stands at its centre, and has that position. The paper's second part, queries that look at
the question and at the unpooled tokens before a layer of the LLM (section 3.3), is not there.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Float32, Inputs, Int32, Kept, Method
from localvlm.pruning.regions import normed, pooled, shares, side_for, softmax

__all__ = ["FLASHSLOTH"]

SIDES = (2, 3, 4)


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the weights, for a model of that width."""
    return {"norm.weight": (width,), "up.weight": (width, width), "up.bias": (width,), "down.weight": (1, width)}


def average(inputs: Inputs, k: int) -> Kept:
    assert inputs.weights is not None
    w = inputs.weights

    def weighted(x: Float32) -> Float32:
        """(regions, p, d) -> (regions, d)."""
        hidden = gelu(normed(x, w["norm.weight"]) @ w["up.weight"].T + w["up.bias"])
        return np.asarray(np.einsum("rp,rpd->rd", softmax((hidden @ w["down.weight"].T)[..., 0]), x), np.float32)

    return pooled(inputs, side_for(SIDES, inputs.n, k), weighted, "flashsloth")


def gelu(x: Float32) -> Float32:
    """By its tanh approximation."""
    return np.asarray(x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2, np.float32)


def select(inputs: Inputs, k: int) -> Int32:
    return average(inputs, k).index


FLASHSLOTH = Method(
    "flashsloth",
    "regions averaged by learnt weights (trained), blind to the question",
    select,
    needs=frozenset({"features"}),
    average=average,
    shares=shares(SIDES),
    shapes=shapes,
)
