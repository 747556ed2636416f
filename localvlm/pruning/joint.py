"""Ranking tokens jointly over all pictures and their tiles: what each picture keeps at least, and what a tile costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Inputs, Int32

__all__ = ["FLOOR", "best", "floors"]

FLOOR = 0.25
"""Least share of its proportional part of the budget that a picture keeps beside others, so that the model can compare
what the guide did not look at. It costs the picture that is asked about little: of two alike it has up to 7/8 of the
budget."""

Float64 = NDArray[np.float64]


def floors(inputs: Inputs, k: int) -> Int32:
    """(n_pictures,) tokens that each picture keeps at least, one if k allows; nothing for a single one."""
    ends = np.searchsorted(inputs.candidates, np.cumsum(inputs.counts))
    shown = np.diff(ends, prepend=0)
    if np.count_nonzero(shown) < 2 or k < np.count_nonzero(shown):
        return np.zeros(len(shown), np.int32)
    beyond = FLOOR * (k - np.count_nonzero(shown)) * shown / shown.sum()
    return np.where(shown > 0, 1 + np.floor(beyond), 0).astype(np.int32)


def best(inputs: Inputs, k: int) -> Int32:
    """The k candidates of the highest saliency, in order of place, ties to the earlier: each picture has its floor, and
    tiles that are not worth their price are left out.

    A tile is worth its price if, at the same cost, more saliency is kept with it than without: k tokens with it, or
    without it k and as many more as its encoding costs (``Inputs.tile_price``), from the other tiles in use. One tile
    is closed at a time, the least worth first, while k tokens remain; those of ``Inputs.opened`` never are. What is
    saved is time, not spent on more tokens.
    """
    assert inputs.saliency is not None
    ranking = _Ranking(inputs, floors(inputs, k))
    tiles = ranking.tiles_of(ranking.first(k, None))
    while inputs.tile_price > 0 and len(tiles) > 1:
        held = ranking.mass(k, tiles)
        without = {t: tiles - {t} for t in tiles - inputs.opened if ranking.fits(k, tiles - {t})}
        gains = {t: ranking.mass(k + round(inputs.tile_price), rest) - held for t, rest in without.items()}
        worst = max(gains, key=lambda t: gains[t], default=None)
        if worst is None or gains[worst] <= 0:
            break
        tiles = without[worst]
    return np.sort(ranking.first(k, tiles))


class _Ranking:
    """Candidates from the highest saliency to the lowest."""

    def __init__(self, inputs: Inputs, least: Int32) -> None:
        assert inputs.saliency is not None
        order = np.argsort(-inputs.saliency[inputs.candidates], kind="stable")
        self._tokens, self._least = inputs.candidates[order], least
        self._scores: Float64 = inputs.saliency[self._tokens].astype(np.float64)
        self._picture = np.repeat(np.arange(len(inputs.counts)), inputs.counts)[self._tokens]
        self._tile = np.zeros(len(order), np.int32) if inputs.tiles is None else inputs.tiles[self._tokens]

    def _open(self, tiles: set[int] | None) -> NDArray[np.intp]:
        return np.arange(len(self._tokens)) if tiles is None else np.flatnonzero(np.isin(self._tile, list(tiles)))

    def _taken(self, k: int, tiles: set[int] | None) -> NDArray[np.intp]:
        """Places in the ranking of the best k of some tiles, or of all there are, once each picture has its least."""
        found = self._open(tiles)
        first = np.zeros(len(found), bool)
        for picture in np.flatnonzero(self._least):
            first[np.flatnonzero(self._picture[found] == picture)[: self._least[picture]]] = True
        rest = np.flatnonzero(~first)[: max(0, k - int(first.sum()))]
        first[rest] = True
        return found[first]

    def first(self, k: int, tiles: set[int] | None) -> Int32:
        """The tokens that are kept."""
        return self._tokens[self._taken(k, tiles)]

    def mass(self, k: int, tiles: set[int]) -> float:
        """Their saliency together."""
        return float(self._scores[self._taken(k, tiles)].sum())

    def fits(self, k: int, tiles: set[int]) -> bool:
        """Whether some tiles have k tokens, and each picture its least."""
        found = self._open(tiles)
        enough = np.bincount(self._picture[found], minlength=len(self._least)) >= self._least
        return len(found) >= k and bool(enough.all())

    def tiles_of(self, tokens: Int32) -> set[int]:
        """The tiles that hold some tokens."""
        return set(self._tile[np.isin(self._tokens, tokens)].tolist())
