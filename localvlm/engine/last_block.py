"""The repair "llava-last-block", for projector files from which the converter took the block that LLaVA does not use.

llama.cpp's LLaVA graph leaves out the last of ``n_layer`` blocks, and these files are without it already. All blocks
that must run are loaded, so it is enough that ``n_layer`` is one more when graphs are built. Nothing public sets it:
it is written into the tower's parameters, which libmtmd hands out to itself.
"""

from __future__ import annotations

import ctypes
from typing import Any

from localvlm.engine.gguf_header import Header

__all__ = ["LAST_BLOCK", "add_block"]

LAST_BLOCK = "llava-last-block"
"""Made once, when the tower is loaded; the tap has no part in it."""
_FIND = "_Z16clip_get_hparamsPK8clip_ctx"
"""``const clip_hparams * clip_get_hparams(const clip_ctx *)``"""


def _parameters(mmproj: Header) -> list[int]:
    """What ``clip_hparams`` begins with, up to ``n_layer``."""
    heads = mmproj.integer("clip.vision.attention.head_count")
    keys = {
        "image_size": 0,
        "patch_size": 0,
        "embedding_length": 0,
        "feed_forward_length": 0,
        "projection_dim": 0,
        "attention.head_count": 0,
        "attention.head_count_kv": heads,
        "attention.head_dim": 0,
        "block_count": 0,
    }
    return [mmproj.integer(f"clip.vision.{key}", default) for key, default in keys.items()]


def add_block(lib: ctypes.CDLL, context: Any, mmproj: Header) -> bool:
    """Makes an ``mtmd_context``, which begins with its tower, run one block more. False, and nothing is written, where
    the parameters are not found as the file has them.
    """
    try:
        find = lib[_FIND]
    except AttributeError:
        return False
    find.restype, find.argtypes = ctypes.POINTER(ctypes.c_int32), [ctypes.c_void_p]
    tower = ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0]
    known = _parameters(mmproj)
    found = find(tower) if tower else None
    if not found or found[: len(known)] != known:
        return False
    found[len(known) - 1] += 1
    return True
