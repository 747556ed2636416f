"""SGL's small-VLM early exit (arXiv 2412.03324, section 3.2): when the guide's own answer will do.

Two signs that it is right: the guide was sure of each token, and it says the same when it sees only the image tokens
it looked at. Both are geometric means over the answer's tokens, so that long answers are not punished.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONSISTENCY_KEEP", "Score", "confidence", "consistency", "exits"]

CONSISTENCY_KEEP = 0.05
"""Share of its image tokens that the guide sees when its answer is checked (the paper's)."""

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Score:
    """How far the guide's answer is to be trusted; each from 0 to 1."""

    confidence: float
    consistency: float

    @property
    def combined(self) -> float:
        """S = (S_conf + S_cons) / 2."""
        return (self.confidence + self.consistency) / 2


def confidence(logprobs: Float32) -> float:
    """S_conf = exp(mean_i log P(x_i | all image tokens, x_<i)); 0 for an answer without tokens.

    Args:
        logprobs: (n,) natural-log probability of each token of the answer.
    """
    return float(np.exp(np.mean(logprobs, dtype=np.float64))) if len(logprobs) else 0.0


def consistency(logits: Float32, ids: Int32) -> float:
    """S_cons = (prod_i P(x_i | kept image tokens, x_<i))^(1/n); 0 for an answer without tokens.

    Args:
        logits: (n, n_vocab) that predict each token of the answer, from one teacher-forced pass.
        ids: (n,) the answer.
    """
    if not len(ids):
        return 0.0
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(wide, ids[:, None].astype(np.intp), axis=1)[:, 0]
    return float(np.exp(np.mean(chosen - np.log(np.exp(wide).sum(axis=1)))))


def exits(score: Score, threshold: float | None, finish: str) -> bool:
    """Whether the guide's answer is final. One that was cut off never is, and without a threshold none is."""
    return threshold is not None and finish == "stop" and score.combined >= threshold
