"""What a pruning method is: arrays in, indices of kept tokens out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import UsageError

if TYPE_CHECKING:
    from localvlm.pruning.in_llm import InLlm

__all__ = [
    "AUTO_BOUNDS",
    "AUTO_SHARE",
    "Inputs",
    "Keep",
    "Kept",
    "Method",
    "Need",
    "Tokens",
    "budget",
    "holding",
    "share_of",
    "shares",
    "top",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

AUTO_SHARE = 0.9
"""Share of the saliency that the tokens of an "auto" budget hold together: with the floors of localvlm.pruning.kinds,
the fewest tokens at which the demo pair is as often right as with 0.35 of them (``python -m tests.budgets``). That is
of sgl+'s saliency; plain sums are so flat that they come out near the upper bound."""
AUTO_BOUNDS = (0.05, 0.64)
"""Least and largest share of the tokens that "auto" keeps: what SGL's strongest setting keeps (5 %, arXiv 2412.03324,
table 1), and the retention (64 %) at which it loses nothing."""


@dataclass(frozen=True)
class Tokens:
    """A budget counted in tokens, over all pictures."""

    n: int

    def __str__(self) -> str:
        return f"{self.n} tokens"


Keep = float | Tokens | Literal["auto"] | None
"""A budget: a share of the image tokens, a number of them, "auto" (by how the saliency is spread), or None for all."""


@dataclass(frozen=True)
class Inputs:
    """All that a method may look at, over the N image tokens of the model, joint over its pictures.

    Attributes:
        n: N.
        candidates: sorted indices of tokens that are not wholly padding; nothing else is ever kept.
        grids: (rows, columns) of each picture in order, None where its tokens form no raster.
        counts: tokens of each picture.
        saliency: (N,) float32 from the guide; None for methods that need none.
        seed: for methods that draw.
        floor: least share of the tokens of an "auto" budget.
        tiles: (N,) int32 the tile that each token is made of, joint over the pictures; None: one a picture.
        tile_price: encoding one tile, in tokens of the model's prefill that take as long; 0: of no account.
        opened: tiles that cost next to nothing, since the guide's tower, which is the model's, has run for them.
        features: (N, d) float32 rows of the model's projector.
        tower: (n_tower_layer, N) float32 head means of the tower's attention: that of [CLS] to each token or, in
            towers without it, what each token receives, summed over its patches.
        text: (n, d) float32 input embeddings of the question's tokens in the model.
        weights: float32 arrays by name, that a trained method learnt for this model.
    """

    n: int
    candidates: Int32
    grids: tuple[tuple[int, int] | None, ...]
    counts: tuple[int, ...]
    saliency: NDArray[np.float32] | None = None
    seed: int = 0
    floor: float = 0.0
    tiles: Int32 | None = None
    tile_price: float = 0.0
    opened: frozenset[int] = frozenset()
    features: Float32 | None = None
    tower: Float32 | None = None
    text: Float32 | None = None
    weights: Mapping[str, Float32] | None = None


@dataclass(frozen=True)
class Kept:
    """Tokens kept: (k,) sorted indices, and (k, d) float32 rows in their places; None: they stand for themselves."""

    index: Int32
    rows: Float32 | None = None


Need = Literal["features", "tower", "text"]


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        aggregation: how it reads the guide's attention (``guidance.AGGREGATIONS``); None: it needs no guide.
        needs: optional fields of its inputs that it goes by; all tiles of a picture are encoded for them.
        select: (inputs, k) -> sorted indices of k kept tokens, for 1 <= k <= candidates.
        average: the same choice, with what stands in the places of the tokens kept; None: they stand for themselves.
        shares: the only shares of the tokens that it can keep, the largest first; none: any.
        shapes: of the weights that a trained method needs, by name, for a model of that width; None: it is not trained.
        within: (features, weights) -> what goes on between the layers of the LLM with the tokens kept; None: nothing.
    """

    name: str
    summary: str
    select: Callable[[Inputs, int], Int32]
    aggregation: str | None = None
    needs: frozenset[Need] = frozenset()
    average: Callable[[Inputs, int], Kept] | None = None
    shares: tuple[float, ...] = ()
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]] | None = None
    within: Callable[[Float32, Mapping[str, Float32]], InLlm] | None = None


def share_of(keep: Keep, n: int) -> int:
    """The most tokens of n that ``keep`` may come to, known before the guide has looked; at least one."""
    if keep is None:
        return n
    if isinstance(keep, Tokens):
        return min(keep.n, n)
    return max(1, round((AUTO_BOUNDS[1] if keep == "auto" else keep) * n))


def budget(keep: Keep, inputs: Inputs) -> int:
    """Tokens to keep: at least one, at most the candidates. Shares are of all N.

    Raises:
        UsageError: "auto", and nothing tells the tokens apart.
    """
    k = share_of(keep, inputs.n)
    if keep == "auto":
        if inputs.saliency is None:
            raise UsageError("keep 'auto' needs a method that follows a guide", "pass a share, such as --keep 0.35")
        held = holding(AUTO_SHARE, inputs.n, inputs.saliency[inputs.candidates])
        k = max(held, share_of(inputs.floor, inputs.n))
    return min(k, len(inputs.candidates))


def holding(share: float, n: int, scores: NDArray[np.float32]) -> int:
    """The fewest tokens whose non-negative scores add up to ``share`` of all, within AUTO_BOUNDS of n."""
    mass = np.sort(scores.astype(np.float64))[::-1].cumsum()
    low, high = (share_of(bound, n) for bound in AUTO_BOUNDS)
    return min(high, max(low, int(np.searchsorted(mass, share * mass[-1])) + 1))


def shares(k: int, counts: Sequence[int]) -> list[int]:
    """Splits k in proportion to ``counts``, none of them exceeded."""
    ends = np.cumsum([0, *counts])
    return [int(n) for n in np.diff(np.round(ends * k / max(int(ends[-1]), 1)).astype(int))]


def top(scores: NDArray[np.float32], candidates: Int32, k: int) -> Int32:
    """The k candidates of the highest score, in order of place; ties go to the earlier token."""
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return np.sort(candidates[order])
