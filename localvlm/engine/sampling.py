"""Picking the next token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import SamplingOptions
from localvlm.errors import ModelError

__all__ = ["Sampler"]


class Sampler:
    """Greedy at temperature 0, else top-k, then top-p, then a seeded draw; the same seed draws the same tokens."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def pick(self, logits: NDArray[np.float32]) -> tuple[int, float]:
        """(token, natural-log probability of it at temperature 1) from (n_vocab,) logits.

        Raises:
            ModelError: the logits are not numbers.
        """
        top = float(logits.max())  # NaN if any is
        if not np.isfinite(top):
            raise ModelError("the model's logits are not numbers", "its weights are damaged: download it again")
        log_total = top + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
        token = int(logits.argmax()) if self._options.temp <= 0 else self._draw(logits)
        return token, float(logits[token]) - log_total

    def _draw(self, logits: NDArray[np.float32]) -> int:
        options = self._options
        k = min(options.top_k, len(logits)) if options.top_k > 0 else len(logits)
        candidates = np.argpartition(-logits, k - 1)[:k]
        candidates = candidates[np.lexsort((candidates, -logits[candidates]))]
        scaled = logits[candidates].astype(np.float64) / options.temp
        p = np.exp(scaled - scaled[0])
        p /= p.sum()
        kept = min(int(np.searchsorted(np.cumsum(p), options.top_p)) + 1, k)  # p may sum to a little less than 1
        p = p[:kept] / p[:kept].sum()
        return int(candidates[:kept][self._random.choice(kept, p=p)])
