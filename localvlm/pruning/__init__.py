"""Pruning methods by name. A method knows arrays alone: no llama.cpp, no files."""

from __future__ import annotations

from localvlm.errors import UsageError
from localvlm.pruning.base import Inputs, Keep, Method, Tokens, budget, share_of
from localvlm.pruning.controls import GRID, NONE, RANDOM
from localvlm.pruning.presets import PRESETS, mean_kept, preset_named
from localvlm.pruning.sgl import SGL, SGL_PLUS

__all__ = ["METHODS", "PRESETS", "Inputs", "Keep", "Method", "Tokens", "budget", "mean_kept", "method_named",
           "preset_named", "share_of"]  # fmt: skip

METHODS: dict[str, Method] = {m.name: m for m in (SGL_PLUS, SGL, NONE, RANDOM, GRID)}


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method '{name}'", f"choose one of {', '.join(METHODS)}")
    return METHODS[name]
