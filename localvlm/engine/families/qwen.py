"""Qwen2.5-VL (2502.13923): dynamic size, 2x2 patches merge into one token, tokens in raster order, M-RoPE."""

from __future__ import annotations

import math

import numpy as np

from localvlm.engine.families.base import Block, Cut, Family, Int32, Patches, Projector, Size, Tower, whole
from localvlm.engine.gguf_header import Header

__all__ = ["groups_of_four", "open_qwen25", "smart_resize"]

MIN_TOKENS, MAX_TOKENS = 4, 1024
"""Tokens of a picture. The published upper bound, 16384, is more than a laptop can attend to; with window attention
llama.cpp takes n_patches^2 floats, 64 MB at 1024 tokens."""
START, END = "<|vision_start|>", "<|vision_end|>"


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The nearest size whose sides are multiples of ``factor`` and whose area lies within the bounds; the aspect is
    kept as well as that allows (qwen_vl_utils). (width, height).
    """
    w, h = (max(factor, round(n / factor) * factor) for n in (width, height))
    if w * h > max_pixels:
        beta = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(n / beta / factor) * factor) for n in (width, height))
    elif w * h < min_pixels:
        beta = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(n * beta / factor) * factor for n in (width, height))
    return w, h


def groups_of_four(patches: Patches) -> Int32:
    """Rows come in 2x2 groups; in windowed towers group g is the raster cell window[g]."""
    groups = np.arange(patches.rows * patches.columns, dtype=np.int32) // 4
    return groups if patches.window is None else patches.window[groups]


def _tower(mmproj: Header, full_layers: tuple[int, ...] | None) -> Tower:
    return Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=False,
        merge=mmproj.integer("clip.vision.spatial_merge_size", 2),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
        full_layers=full_layers,
    )


def dynamic(name: str, source: str, tower: Tower, max_tokens: int) -> Family:
    """A Qwen-like family of one tile, as large as the bounds allow."""
    cell = tower.patch * tower.merge
    most = max_tokens or MAX_TOKENS

    def cut(width: int, height: int) -> Cut:
        size = smart_resize(width, height, cell, min(MIN_TOKENS, most) * cell**2, most * cell**2)
        return [START, Block((whole(width, height, size, size[1] // cell, size[0] // cell),)), END]

    return Family(name, source, tower, cut, groups_of_four, bounds=(1, most))


def open_qwen25(projector: Projector) -> Family:
    """Qwen2.5-VL: blocks attend within windows, but for every n_wa_pattern-th."""
    mmproj = projector.header
    pattern = mmproj.integer("clip.vision.n_wa_pattern")
    blocks = mmproj.integer("clip.vision.block_count")
    full = tuple(i for i in range(blocks) if (i + 1) % pattern == 0) if pattern > 0 else None
    return dynamic("qwen2.5vl", "2502.13923; qwen_vl_utils", _tower(mmproj, full), projector.max_tokens)
