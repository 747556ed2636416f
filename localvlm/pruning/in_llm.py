"""What a method within the LLM is: before some of its layers, image tokens leave.

Budgets are the MEAN over the layers: the image tokens in a layer, averaged over all of them, as a share of those of the
prompt. Papers give their layers for models of 32, and here they are scaled to a model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Kept, Need

if TYPE_CHECKING:
    from localvlm.pruning.dyvte import Gate

__all__ = ["Cut", "InLlm", "Seen", "at_depth", "cuts_for", "mean_kept"]

Float32 = NDArray[np.float32]

DEPTH = 32
"""Layers of the models that the papers tell their layers of (LLaVA-1.5-7B)."""


class Cut(NamedTuple):
    """From ``layer`` on, ``k`` image tokens stay."""

    layer: int
    k: int


@dataclass(frozen=True)
class Seen:
    """What a method may look at before a layer, of the m image tokens that are still there.

    Attributes:
        layer: that layer.
        attention: (n_head, m) float32 of the layer before, to each of them, averaged over the rows of text that rate.
        rows: (m, d) float32 hidden rows; None unless the method asks for them.
        text: (t, d) float32 hidden rows of the text after the last image token; likewise.
    """

    layer: int
    attention: Float32
    rows: Float32 | None = None
    text: Float32 | None = None


@dataclass(frozen=True)
class InLlm:
    """One method that drops tokens between layers.

    Attributes:
        cuts: (mean share to keep, n, n_layer) -> cuts of a prompt of n image tokens, in order of their layers, which
            are 1 or above; none where nothing is to leave. The least there is where the share cannot be reached.
        select: (seen, k) -> which of the m tokens stay, counted from 0.
        raters: (rows, text) that enter layer 0 -> the rows of text, counted from 0, whose attention rates the image
            tokens; None: the last row alone.
        hidden: whether ``select`` looks at hidden rows.
        sweeps: whether it goes by the share to keep; else it has a share of its own.
        trained: the method with the gates that were trained for a model, by the layer before which each stands; None:
            it is not trained.
    """

    name: str
    summary: str
    cuts: Callable[[float, int, int], tuple[Cut, ...]]
    select: Callable[[Seen, int], Kept]
    raters: Callable[[Float32, Float32], Sequence[int]] | None = None
    hidden: bool = False
    sweeps: bool = True
    trained: Callable[[Mapping[int, Gate]], InLlm] | None = None
    aggregation: ClassVar[None] = None
    """It needs no guide, and nothing that is there before the LLM runs."""
    needs: ClassVar[frozenset[Need]] = frozenset()


def at_depth(layer: int, n_layer: int) -> int:
    """The place in a model of ``n_layer`` layers of one that a paper has in DEPTH: its second at the earliest."""
    return min(max(1, round(layer * n_layer / DEPTH)), n_layer - 1)


def mean_kept(steps: Sequence[tuple[int, int]], n_layer: int) -> float:
    """Image tokens in a layer, averaged over ``n_layer`` of them. ``steps``: (layer, tokens from it on), from 0."""
    ends = [*(layer for layer, _ in steps[1:]), n_layer]
    return sum(n * (end - layer) for (layer, n), end in zip(steps, ends, strict=True)) / n_layer


def cuts_for(
    keep: float, n: int, n_layer: int, layers: Sequence[int], shares: Callable[[float], Sequence[float]]
) -> tuple[Cut, ...]:
    """The cuts of a method at which a layer has ``keep`` of n image tokens on average, within half a token.

    ``layers`` are those of its stages in a model of DEPTH; of stages that fall on one layer the last stands alone.
    ``shares`` tells, for t in 0..1, the shares of n that stay from each stage on; they rise with t, up to 1. At least
    one token stays.
    """
    stages = {at_depth(layer, n_layer): stage for stage, layer in enumerate(layers)}
    if keep >= 1 or not n or n_layer < 2:
        return ()
    spans = np.diff([*stages, n_layer])

    def counts(t: float) -> NDArray[np.float64]:
        return np.maximum(1.0, n * np.asarray(shares(t), np.float64)[list(stages.values())])

    wanted = keep * n * n_layer - n * next(iter(stages))
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if spans @ counts(t) <= wanted else (low, t)
    return tuple(Cut(layer, round(float(k))) for layer, k in zip(stages, counts(low), strict=True))
