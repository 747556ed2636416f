"""SparseVLM (arXiv 2410.04417): rows of text that fit the picture rate its tokens, which leave in three stages.

Raters (section 3.2): of the rows that enter layer 0, m = mean over image tokens of softmax over text (V T^t); the rows
of text with m above the mean of m rate. Before layers 2, 6 and 15 of 32, the image tokens with the most attention, mean
over raters and heads, stay. How many is told by the tables of the released code, of 576 tokens each, here scaled and
interpolated; the paper's own count by the rank of the attention (section 3.3) is in none of them, nor here.

``sparsevlm`` recycles (section 3.4): the most attended 30 % of those that leave are clustered by their density peaks,
and each cluster becomes one token, the mean of its hidden rows. It stands in the place, and has the position, of its
cluster's centre, where the code puts it behind the picture. Merged tokens are counted into the mean.
``sparsevlm-v2``, of the later release, merges none and goes by those 14 of 32 heads that attend to the picture most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Int32, Kept, top
from localvlm.pruning.fastv import attended
from localvlm.pruning.in_llm import Cut, InLlm, Seen, cuts_for

__all__ = ["SPARSEVLM", "SPARSEVLM_V2", "clustered", "raters"]

Float32 = NDArray[np.float32]

LAYERS = (2, 6, 15)
GRID = 576
"""Image tokens that the tables are of."""
MEANS = (64, 128, 192)
TABLE = ((66, 30, 17), (303, 110, 36), (300, 200, 110))
"""Most attended tokens that stay from each stage on, by the mean over the layers."""
TABLE_V2 = ((66, 34, 20), (238, 108, 60), (300, 200, 118))
RECYCLED = 0.3
"""Share of the tokens that leave which is clustered."""
CLUSTER = 10
"""Tokens for each cluster."""
HEADS = 14 / 32


def raters(rows: Float32, text: Float32) -> Sequence[int]:
    """Which of (t, d) ``text`` fit the (m, d) ``rows`` of the picture better than the mean; all where none does."""
    scores = rows @ text.T
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    fit = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    chosen = np.flatnonzero(fit > fit.mean())
    return [int(i) for i in (chosen if len(chosen) else np.arange(len(text)))]


def _pool(dropped: int) -> int:
    """Tokens that are clustered."""
    return int(RECYCLED * dropped) + 1 if dropped else 0


def _merged(dropped: int) -> int:
    """Tokens that these become."""
    return _pool(dropped) // CLUSTER + 1 if dropped else 0


def _with_merged(counts: Sequence[int]) -> list[int]:
    """A row of the table, merged tokens counted in."""
    out, before = [], GRID
    for n in counts:
        before = n + _merged(before - n)
        out.append(before)
    return out


def _shares(table: Sequence[Sequence[int]], t: float) -> list[float]:
    """Shares that stay from each stage on at a mean of t, between the rows of the table."""
    columns = zip((0, 0, 0), *table, (GRID, GRID, GRID), strict=True)
    return [float(np.interp(t * GRID, (0, *MEANS, GRID), column)) / GRID for column in columns]


def cuts(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:
    table = [_with_merged(row) for row in TABLE]
    return cuts_for(keep, n, n_layer, LAYERS, lambda t: _shares(table, t))


def cuts_v2(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:
    return cuts_for(keep, n, n_layer, LAYERS, lambda t: _shares(TABLE_V2, t))


def recycle(seen: Seen, k: int) -> Kept:
    """The most attended, and with them the clusters of those that come next: k together."""
    assert seen.rows is not None
    scores, m = seen.attention.mean(axis=0), seen.attention.shape[1]
    n = next((n for n in range(k, 0, -1) if n + _merged(m - n) <= k), 1)
    pool, merged = _pool(m - n), min(_merged(m - n), k - n)
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    if not merged:
        return attended(seen, k)
    next_best = order[n : n + pool]
    centres, means = clustered(seen.rows[next_best], merged)
    index = np.concatenate([order[:n], next_best[centres]])
    rows = np.concatenate([seen.rows[order[:n]], means])
    place = np.argsort(index)
    return Kept(index[place], rows[place])


def clustered(rows: Float32, k: int) -> tuple[Int32, Float32]:
    """Density-peak clustering of (n, d) rows: the indices of the k centres, and the (k, d) means of their clusters.

    With distances d_ij = |x_i - x_j| / sqrt(d), a row's density is exp(-mean of d^2 to its k nearest, itself among
    them); centres have the highest product of density and distance to the nearest denser row (the largest distance of
    all for the densest); each row joins the nearest centre. Ties go to the earlier row.
    """
    wide = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    square = np.einsum("nd,nd->n", wide, wide)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * (wide @ wide.T), 0) / rows.shape[1])
    np.fill_diagonal(distance, 0)
    density = np.exp(-(np.partition(distance, k - 1, axis=1)[:, :k] ** 2).mean(axis=1))
    rank = np.argsort(np.argsort(-density, kind="stable"))
    apart = np.where(rank[None, :] < rank[:, None], distance, distance.max()).min(axis=1)
    centres = np.argsort(-apart * density, kind="stable")[:k].astype(np.int32)
    joins = distance[:, centres].argmin(axis=1)
    joins[centres] = np.arange(k)
    means = np.zeros((k, rows.shape[1]), np.float32)
    np.add.at(means, joins, rows)
    means /= np.bincount(joins, minlength=k)[:, None]
    return centres, means


def most_visual(seen: Seen, k: int) -> Kept:
    """The k tokens of the highest attention, mean over the heads that attend to image tokens most."""
    heads = max(1, round(HEADS * len(seen.attention)))
    chosen = np.argsort(-seen.attention.sum(axis=1), kind="stable")[:heads]
    scores = seen.attention[chosen].mean(axis=0)
    return Kept(top(scores, np.arange(len(scores), dtype=np.int32), k))


SPARSEVLM = InLlm(
    "sparsevlm", "attention of the words that fit the picture, three stages, the best of the rest merged",
    cuts, recycle, raters, hidden=True,
)  # fmt: skip
SPARSEVLM_V2 = InLlm(
    "sparsevlm-v2", "the same without merging, by the heads that look at the picture", cuts_v2, most_visual, raters
)
