"""What a pruning method is: arrays in, indices of kept tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Inputs", "Method", "budget", "share_of", "top"]

Int32 = NDArray[np.int32]


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
    """

    n: int
    candidates: Int32
    grids: tuple[tuple[int, int] | None, ...]
    counts: tuple[int, ...]
    saliency: NDArray[np.float32] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        aggregation: how it reads the guide's attention (``guidance.AGGREGATIONS``); None: it needs no guide.
        select: (inputs, k) -> sorted indices of k kept tokens.
    """

    name: str
    summary: str
    select: Callable[[Inputs, int], Int32]
    aggregation: str | None = None


def share_of(keep: float | None, n: int) -> int:
    """Tokens that the share ``keep`` of n is: at least one; all of them if None."""
    return n if keep is None else max(1, round(keep * n))


def budget(keep: float | None, inputs: Inputs) -> int:
    """Tokens to keep: the share ``keep`` of all N, at least one, at most the candidates."""
    return min(share_of(keep, inputs.n), len(inputs.candidates))


def top(scores: NDArray[np.float32], candidates: Int32, k: int) -> Int32:
    """The k candidates of the highest score, in order of place; ties go to the earlier token."""
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return np.sort(candidates[order])
