"""FlashSloth (arXiv 2412.04317): regions averaged by learnt weights, and queries that look at the question. Trained.

Section 3.2, spatial attention pooling (SAP): a region of ``side`` x ``side`` tokens x becomes

    sum_i softmax(down gelu(up x))_i x_i

the softmax over the region, blind to the question; its row stands at the region's centre, and has that position.

Section 3.3, embedded queries (EmbQ): QUERIES learnt rows run along, and before a layer (LAYER of 32, scaled) they look
at the question's hidden rows t, then at the unpooled tokens x, by cross-attention that is added to them:

    q <- q + look(q, t),   q <- q + look(q, x),   look(q, s) = out softmax((Q q)^T (K s) / sqrt(d_head)) V s

in heads of HEAD channels. They stand in the places of the last tokens of the last picture. Here x are the projector's
rows, the LLM's weights are not trained, and norms stand before ``up``, Q, K and V.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from localvlm.pruning.base import Float32, Inputs, Int32, Kept, Method
from localvlm.pruning.in_llm import Cut, InLlm, Seen, at_depth
from localvlm.pruning.regions import HEAD, heads, normed, pooled, shares, side_for, softmax

__all__ = ["FLASHSLOTH"]

SIDES = (3, 4)
QUERIES = 4
"""9 beside 81 rows of regions in the paper."""
LAYER = 8


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the weights, for a model of that width."""
    out: dict[str, tuple[int, ...]] = {"queries": (QUERIES, width)}
    out |= {"norm.weight": (width,), "up.weight": (width, width), "up.bias": (width,), "down.weight": (1, width)}
    for look in ("asks", "looks"):
        out |= {f"{look}.{name}.weight": (width, width) for name in ("q", "k", "v", "out")}
        out |= {f"{look}.{name}.weight": (width,) for name in ("norm", "norm_seen")}
    return out


def average(inputs: Inputs, k: int) -> Kept:
    """The rows of regions, at most k if there can be so few, and the queries."""
    assert inputs.weights is not None
    w = inputs.weights

    def weighted(x: Float32) -> Float32:
        """(regions, p, d) -> (regions, d)."""
        hidden = gelu(normed(x, w["norm.weight"]) @ w["up.weight"].T + w["up.bias"])
        return np.asarray(np.einsum("rp,rpd->rd", softmax((hidden @ w["down.weight"].T)[..., 0]), x), np.float32)

    places = inputs.candidates[-QUERIES:]
    regions = pooled(inputs, side_for(SIDES, inputs.n, k), weighted, "flashsloth")
    stay = ~np.isin(regions.index, places)
    assert regions.rows is not None
    return Kept(
        np.concatenate([regions.index[stay], places]),
        np.concatenate([regions.rows[stay], w["queries"][: len(places)]]),
    )


def looking(features: Float32, weights: Mapping[str, Float32]) -> InLlm:
    """What the queries do within the LLM, by (N, d) ``features`` of the unpooled tokens."""

    def cuts(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:  # noqa: ARG001 - all stay
        return (Cut(at_depth(LAYER, n_layer), n),)

    def select(seen: Seen, k: int) -> Kept:
        assert seen.rows is not None
        assert seen.text is not None
        q = seen.rows[-QUERIES:]
        q = q + look(weights, "asks", q, seen.text)
        q = q + look(weights, "looks", q, features)
        return Kept(np.arange(k, dtype=np.int32), np.concatenate([seen.rows[:-QUERIES], q]))

    return InLlm("flashsloth", FLASHSLOTH.summary, cuts, select, hidden=True, sweeps=False)


def look(weights: Mapping[str, Float32], name: str, rows: Float32, seen: Float32) -> Float32:
    """Cross-attention of (n, d) rows to (m, d) others."""
    norm, norm_seen, q, k, v, out = (
        weights[f"{name}.{part}.weight"] for part in ("norm", "norm_seen", "q", "k", "v", "out")
    )
    others = normed(seen, norm_seen)
    asked, keys, values = heads(normed(rows, norm) @ q.T), heads(others @ k.T), heads(others @ v.T)
    weight = softmax(np.einsum("nhc,mhc->hnm", asked, keys) / np.float32(HEAD**0.5))
    return np.asarray(np.einsum("hnm,mhc->nhc", weight, values).reshape(len(rows), -1) @ out.T, np.float32)


def gelu(x: Float32) -> Float32:
    """By its tanh approximation."""
    return np.asarray(x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2, np.float32)


def select(inputs: Inputs, k: int) -> Int32:
    return average(inputs, k).index


FLASHSLOTH = Method(
    "flashsloth",
    "regions averaged by learnt weights, and queries that look at the question within the LLM (trained)",
    select,
    needs=frozenset({"features"}),
    average=average,
    shares=shares(SIDES),
    shapes=shapes,
    within=looking,
)
