"""Pruning methods by name. A method knows arrays alone: no llama.cpp, no files."""

from __future__ import annotations

from localvlm.errors import UsageError
from localvlm.pruning.base import Inputs, Keep, Kept, Method, Need, Tokens, budget, share_of
from localvlm.pruning.cdpruner import CDPRUNER
from localvlm.pruning.cls_attention import FASTERVLM, VTC_CLS
from localvlm.pruning.controls import GRID, NONE, RANDOM
from localvlm.pruning.divprune import DIVPRUNE
from localvlm.pruning.presets import PRESETS, mean_kept, preset_named
from localvlm.pruning.scope import SCOPE
from localvlm.pruning.sgl import SGL, SGL_PLUS
from localvlm.pruning.tome import TOME
from localvlm.pruning.visionzip import VISIONZIP
from localvlm.pruning.vispruner import VISPRUNER

__all__ = ["METHODS", "PRESETS", "Inputs", "Keep", "Kept", "Method", "Need", "Tokens", "budget", "mean_kept",
           "method_named", "preset_named", "share_of"]  # fmt: skip

METHODS: dict[str, Method] = {m.name: m for m in (
    SGL_PLUS, SGL, FASTERVLM, VTC_CLS, DIVPRUNE, CDPRUNER, SCOPE, VISIONZIP, VISPRUNER, TOME, NONE, RANDOM, GRID,
)}  # fmt: skip


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method '{name}'", f"choose one of {', '.join(METHODS)}")
    return METHODS[name]
