"""What is asked of every question: methods times budgets, and the rows that all others are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localvlm.errors import UsageError
from localvlm.pruning import IN_LLM, METHODS, PRESETS

__all__ = ["AT_LAYER", "BLIND", "CHOICES", "CONTROLS", "DOWNSCALE", "GUIDE", "UNPRUNED", "Cell", "cells"]


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method at a budget.

    Attributes:
        keep: share of the image tokens, as the mean over the model's layers; None where there is no choice.
    """

    method: str
    keep: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.keep is None else f"{self.method} {100 * self.keep:.4g}%"

    @property
    def aggregation(self) -> str | None:
        """How the method reads the guide's attention; None if it needs no guide."""
        method = "sgl+" if self.method in AT_LAYER else self.method
        return METHODS[method].aggregation if method in METHODS else None

    @property
    def fixed(self) -> bool:
        """Whether the share is one of the method's own."""
        return self.method in METHODS and bool(METHODS[self.method].shares)


UNPRUNED, BLIND, GUIDE = Cell("none"), Cell("blind"), Cell("guide")
"""The model from all image tokens, and from none; the guide's own answer."""
DOWNSCALE = "downscale"
"""See :mod:`localvlm.evaluation.downscale`."""
CONTROLS = {
    DOWNSCALE: "the picture in fewer tokens, none of them chosen (control of eval)",
    BLIND.method: "no picture (control of eval)",
    GUIDE.method: "the guide's own answer (control of eval)",
}
"""What evaluations alone compare with, and what it is."""
AT_LAYER = {
    "layer": "sgl+, where FastV drops tokens: before an early layer of the model (row of eval)",
    **{name: f"sgl+ at a layer and a share of SGL's paper: {name[6:]} % on average (row of eval)" for name in PRESETS},
}
"""SGL+ with tokens that leave within the LLM, beside the methods that do so."""
CHOICES = (*METHODS, *IN_LLM, *AT_LAYER, *CONTROLS)
"""Methods that can be asked for."""


def cells(methods: Sequence[str], keeps: Sequence[float], *, guide: bool) -> list[Cell]:
    """The plan: unpruned and blind, which the others are measured by, the guide if it looks, then every method at every
    budget, the largest first. ``guide``: whether the pair has one.

    Raises:
        UsageError: a method is not known, or needs a guide and there is none.
    """
    unknown = [m for m in methods if m not in CHOICES]
    if unknown:
        raise UsageError(f"there is no method '{unknown[0]}'", f"choose of {', '.join(CHOICES)}")
    fixed = [c.method for c in (UNPRUNED, BLIND, GUIDE)]
    budgets = sorted(set(keeps), reverse=True)
    wanted = [Cell(m, keep) for m in dict.fromkeys(methods) if m not in fixed for keep in _budgets(m, budgets)]
    needing = [c.method for c in wanted if c.aggregation is not None] + [m for m in methods if m == GUIDE.method]
    if needing and not guide:
        raise UsageError(f"method '{needing[0]}' needs a guide and none was given", "pass --guide, or --pair")
    return [UNPRUNED, BLIND, *([GUIDE] if needing else []), *wanted]


def _budgets(method: str, asked: Sequence[float]) -> Sequence[float | None]:
    """Those that are asked for, unless it has shares of its own."""
    if Cell(method).fixed:
        return METHODS[method].shares
    return asked if method not in PRESETS and (method not in IN_LLM or IN_LLM[method].sweeps) else [None]
