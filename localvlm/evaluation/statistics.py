"""What scores come to: shares with their intervals, and what they are worth against no pruning and no picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Accuracy", "Detection", "detection", "floor_adjusted", "mean_score", "of_unpruned", "wilson"]

Z95 = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Accuracy:
    """A mean score of ``n`` questions, and the 95 % interval of the true one."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Detection:
    """How yes and no were told apart; None where nothing was there to be counted.

    Attributes:
        neither: answers that said neither yes nor no: wrong, and no "yes".
        yes: share of the answers that said yes.
    """

    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes: float
    neither: int


def wilson(mean: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: the p at which (mean - p)^2 = z^2 p (1 - p) / n.

    It holds for scores between 0 and 1 as well, whose variance is never larger; it is then wider than need be.
    """
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if mean == 0 else (centre - half) / scale
    return low, (1.0 if mean == 1 else (centre + half) / scale)


def mean_score(scores: Sequence[float]) -> Accuracy:
    """Mean and interval of at least one score."""
    mean = math.fsum(scores) / len(scores)
    return Accuracy(len(scores), mean, *wilson(mean, len(scores)))


def of_unpruned(score: float, full: float) -> float | None:
    """Share of the unpruned score that is left; None if that is 0."""
    return score / full if full > 0 else None


def floor_adjusted(score: float, blind: float, full: float) -> float | None:
    """(score - blind) / (full - blind): what is left of what the picture gives; None if it gives nothing."""
    return (score - blind) / (full - blind) if full > blind else None


def detection(said: Sequence[bool | None], true: Sequence[bool]) -> Detection:
    """POPE's figures (arXiv 2305.10355, section 4.1), "yes" being what is looked for."""
    hits = sum(s is True and t for s, t in zip(said, true, strict=True))
    yes, there = sum(s is True for s in said), sum(true)
    precision = hits / yes if yes else None
    recall = hits / there if there else None
    return Detection(
        accuracy=sum(s is t for s, t in zip(said, true, strict=True)) / len(said),
        precision=precision,
        recall=recall,
        f1=2 * hits / (yes + there) if yes + there else None,
        yes=yes / len(said),
        neither=sum(s is None for s in said),
    )
