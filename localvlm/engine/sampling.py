"""Picking the next token, of those that a grammar allows if there is one."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import SamplingOptions
from localvlm.engine.drafts import lead_of
from localvlm.errors import ModelError

__all__ = ["Sampler"]


Float32 = NDArray[np.float32]

_COLDEST = 1e-260
"""Temperatures below it are as it is, a draw among the likeliest alone: divided by them, logits would be infinite."""


class Rules(Protocol):
    """What :class:`localvlm.engine.grammar.Grammar` is to a sampler."""

    def allows(self, token: int) -> bool: ...

    def masked(self, logits: Float32, least: int) -> Float32: ...

    def accept(self, token: int) -> None: ...


class Sampler:
    """Greedy at temperature 0, else top-k, then top-p, then a seeded draw; the same seed draws the same tokens.

    With ``rules``, a token that these do not allow is picked again, among those that they do.
    """

    def __init__(self, options: SamplingOptions, rules: Rules | None = None) -> None:
        self._options, self._rules = options, rules
        self._random = np.random.default_rng(options.seed)

    def pick(self, logits: Float32) -> tuple[int, float]:
        """(token, natural-log probability of it at temperature 1, rules left out) from (n_vocab,) logits.

        Raises:
            ModelError: the logits are not numbers.
        """
        top = float(logits.max())  # NaN if any is
        if not np.isfinite(top):
            raise ModelError("the model's logits are not numbers", "its weights are damaged: download it again")
        log_total = top + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
        token = self._choose(logits)
        if self._rules is not None:
            if not self._rules.allows(token):
                token = self._choose(self._rules.masked(logits, self._enough(len(logits))))
            self._rules.accept(token)
        return token, float(logits[token]) - log_total

    def lead(self, logits: Float32) -> float:
        """By how much the likeliest allowed token leads the next, in logits: how sure a greedy pick is."""
        if self._rules is not None and not self._rules.allows(int(logits.argmax())):
            logits = self._rules.masked(logits, 2)
        return lead_of(logits)

    def _enough(self, n: int) -> int:
        """How many allowed tokens a choice among n looks at."""
        options = self._options
        return 1 if options.temp <= 0 else min(options.top_k, n) if options.top_k > 0 else n

    def _choose(self, logits: Float32) -> int:
        return int(logits.argmax()) if self._options.temp <= 0 else self._draw(logits)

    def _draw(self, logits: Float32) -> int:
        options = self._options
        k = min(options.top_k, len(logits)) if options.top_k > 0 else len(logits)
        candidates = np.argpartition(-logits, k - 1)[:k]
        candidates = candidates[np.lexsort((candidates, -logits[candidates]))]
        scaled = logits[candidates].astype(np.float64) / max(options.temp, _COLDEST)
        p = np.exp(scaled - scaled[0])
        p /= p.sum()
        kept = min(int(np.searchsorted(np.cumsum(p), options.top_p)) + 1, k)  # p may sum to a little less than 1
        p = p[:kept] / p[:kept].sum()
        return int(candidates[:kept][self._random.choice(kept, p=p)])
