"""QueCC (arXiv 2411.03312): one row for each region of the picture, made as the question asks. Trained.

Section 5: the question's embedding t is added to every token, a depthwise convolution of size and stride ``side`` makes
one query of each region, and the query attends to the tokens x of its own region,

    out softmax((q c)^T (k x) / sqrt(d_head)) v x,    c = conv(x + text t)

in heads of HEAD channels, with a norm before q and k. Here x are the projector's rows, the LLM's weights are not
trained, and t is the mean of the question's input embeddings, where the paper takes the LLM's last hidden row of the
question's last token. The row of a region stands at its centre, and has that position.
"""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Float32, Inputs, Int32, Kept, Method
from localvlm.pruning.regions import HEAD, heads, normed, pooled, shares, side_for, softmax

__all__ = ["QUECC"]

SIDES = (2, 3, 4)


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the weights, for a model of that width."""
    out: dict[str, tuple[int, ...]] = {f"conv.{side}": (width, side**2) for side in SIDES}
    out |= {f"{name}.weight": (width, width) for name in ("text", "q", "k", "v", "out")}
    return out | {f"{name}.weight": (width,) for name in ("norm_query", "norm_key")}


def average(inputs: Inputs, k: int) -> Kept:
    assert inputs.text is not None
    assert inputs.weights is not None
    w, side = inputs.weights, side_for(SIDES, inputs.n, k)
    asked = w["text.weight"] @ inputs.text.mean(axis=0)

    def attended(x: Float32) -> Float32:
        """(regions, p, d) -> (regions, d)."""
        c = np.einsum("rpd,dp->rd", x + asked, w[f"conv.{side}"])
        q = heads(normed(c, w["norm_query.weight"]) @ w["q.weight"].T)
        k, v = heads(normed(x, w["norm_key.weight"]) @ w["k.weight"].T), heads(x @ w["v.weight"].T)
        weight = softmax(np.einsum("rhc,rphc->rhp", q, k) / np.float32(HEAD**0.5))
        return np.asarray(np.einsum("rhp,rphc->rhc", weight, v).reshape(len(x), -1) @ w["out.weight"].T, np.float32)

    return pooled(inputs, side, attended, "quecc")


def select(inputs: Inputs, k: int) -> Int32:
    return average(inputs, k).index


QUECC = Method(
    "quecc",
    "a row for each region, made as the question asks (trained)",
    select,
    needs=frozenset({"features", "text"}),
    average=average,
    shares=shares(SIDES),
    shapes=shapes,
)
