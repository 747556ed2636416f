"""Pruning methods by name. A method knows arrays alone: no llama.cpp, no files."""

from __future__ import annotations

from localvlm.errors import UsageError
from localvlm.pruning.base import Inputs, Keep, Kept, Method, Need, Tokens, budget, share_of
from localvlm.pruning.cdpruner import CDPRUNER
from localvlm.pruning.cls_attention import FASTERVLM, VTC_CLS
from localvlm.pruning.controls import GRID, NONE, RANDOM
from localvlm.pruning.divprune import DIVPRUNE
from localvlm.pruning.dyvte import DYVTE
from localvlm.pruning.fastv import FASTV
from localvlm.pruning.flashsloth import FLASHSLOTH
from localvlm.pruning.in_llm import InLlm, Seen, mean_kept
from localvlm.pruning.presets import PRESETS, preset_named
from localvlm.pruning.pyramiddrop import PYRAMIDDROP
from localvlm.pruning.quecc import QUECC
from localvlm.pruning.scope import SCOPE
from localvlm.pruning.sgl import SGL, SGL_PLUS
from localvlm.pruning.sparsevlm import SPARSEVLM, SPARSEVLM_V2
from localvlm.pruning.tome import TOME
from localvlm.pruning.visionzip import VISIONZIP
from localvlm.pruning.vispruner import VISPRUNER

__all__ = ["IN_LLM", "METHODS", "PRESETS", "InLlm", "Inputs", "Keep", "Kept", "Method", "Need", "Seen", "Tokens",
           "budget", "mean_kept", "method_named", "preset_named", "share_of"]  # fmt: skip

IN_LLM: dict[str, InLlm] = {m.name: m for m in (FASTV, SPARSEVLM, SPARSEVLM_V2, PYRAMIDDROP, DYVTE)}
"""Methods that drop tokens between layers; METHODS choose them before the first."""
METHODS: dict[str, Method] = {m.name: m for m in (
    SGL_PLUS, SGL, FASTERVLM, VTC_CLS, DIVPRUNE, CDPRUNER, SCOPE, VISIONZIP, VISPRUNER, TOME, QUECC, FLASHSLOTH,
    NONE, RANDOM, GRID,
)}  # fmt: skip


def method_named(name: str) -> Method | InLlm:
    """The method called ``name``, of METHODS or IN_LLM.

    Raises:
        UsageError: there is none.
    """
    found = METHODS.get(name) or IN_LLM.get(name)
    if found is None:
        raise UsageError(f"there is no method '{name}'", f"choose one of {', '.join((*METHODS, *IN_LLM))}")
    return found
