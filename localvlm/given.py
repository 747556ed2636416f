"""Which image tokens a model was given in the course of a conversation, and where in the prompt they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Given", "Group"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Group:
    """Sorted indices of tokens of one picture, and the turn before whose text they stand. A picture's first group
    stands where the picture does.
    """

    turn: int
    tokens: Int32


@dataclass(frozen=True)
class Given:
    """``groups`` of each picture; ``attended``: (n_tokens,) of each, what the guide's looks at it add up to."""

    groups: tuple[tuple[Group, ...], ...] = ()
    attended: tuple[Float32, ...] = ()

    @property
    def tokens(self) -> list[Int32]:
        """Sorted indices of each picture's tokens."""
        none = np.zeros(0, np.int32)
        return [np.sort(np.concatenate([none, *(g.tokens for g in groups)])) for groups in self.groups]

    def seen(self, saliency: Float32, counts: Sequence[int]) -> Given:
        """With another look of the guide: ``saliency`` (N,), joint over pictures of ``counts`` tokens."""
        borders = np.cumsum([0, *counts])
        before = [*self.attended, *(np.zeros(n, np.float32) for n in counts[len(self.attended) :])]
        share = saliency / max(float(saliency.sum()), 1e-12)
        return replace(
            self, attended=tuple(b + share[i:j] for b, (i, j) in zip(before, pairwise(borders), strict=True))
        )

    def more(
        self, turn: int, wanted: Sequence[Int32 | None], room: int | None = None, *, in_order: bool = False
    ) -> Given:
        """With those of ``wanted`` (None: all) that are not there yet. Of pictures that something was given of, at most
        ``room`` are added, those attended to most first, less what the other pictures get. ``in_order``: not added, but
        put where the picture stands, together with those that were there.
        """
        counts = [len(a) for a in self.attended]
        groups = (*self.groups, *[()] * (len(counts) - len(self.groups)))
        had = [*self.tokens, *[np.zeros(0, np.int32)] * (len(counts) - len(self.groups))]
        all_of = [np.arange(n, dtype=np.int32) if w is None else w for w, n in zip(wanted, counts, strict=True)]
        new = [np.setdiff1d(w, h).astype(np.int32) for w, h in zip(all_of, had, strict=True)]
        if room is not None:
            new = self._within(room, had, new)
        if in_order:
            joined = [np.union1d(*both).astype(np.int32) for both in zip(had, new, strict=True)]
            return replace(self, groups=tuple((Group(turn, tokens),) for tokens in joined))
        return replace(
            self,
            groups=tuple((*g, Group(turn, n)) if len(n) or not g else g for g, n in zip(groups, new, strict=True)),
        )

    def _within(self, room: int, had: Sequence[Int32], new: Sequence[Int32]) -> list[Int32]:
        """Nothing would be seen of a picture that has no tokens yet, so it gets all that were chosen."""
        left = max(0, room - sum(len(n) for n, h in zip(new, had, strict=True) if not len(h)))
        begun = [n if len(h) else n[:0] for n, h in zip(new, had, strict=True)]
        if sum(map(len, begun)) > left:
            begun = self._most(begun, left)
        return [b if len(h) else n for b, n, h in zip(begun, new, had, strict=True)]

    def _most(self, tokens: Sequence[Int32], n: int) -> list[Int32]:
        scores = np.concatenate([a[t] for a, t in zip(self.attended, tokens, strict=True)])
        best = np.sort(np.argsort(-scores, kind="stable")[:n])
        borders = np.cumsum([0, *map(len, tokens)])
        return [t[best[(best >= i) & (best < j)] - i] for t, (i, j) in zip(tokens, pairwise(borders), strict=True)]
