"""Qwen2-VL (2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL (2511.21631): a picture of any size is one tile, 2x2
patches merge into one token, tokens in raster order, M-RoPE. Qwen3-VL's deepstack features lie behind each row's
embedding, so that they stay and go with it.
"""

from __future__ import annotations

import math

import numpy as np

from localvlm.engine.families.base import Block, Cut, Family, Int32, Patches, Projector, Size, Tower, whole

__all__ = ["groups_of_four", "open_qwen2", "open_qwen3", "open_qwen25", "smart_resize"]

MAX_TOKENS = 1024
"""Tokens of a picture. The published upper bound, 16384, is more than a laptop can attend to; with window attention
llama.cpp takes n_patches^2 floats, 64 MB at 1024 tokens."""
SOURCE = "image_processing_qwen2_vl.py of transformers"
START, END = "<|vision_start|>", "<|vision_end|>"


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The nearest size whose sides are multiples of ``factor`` and whose area lies within the bounds; the aspect is
    kept as well as that allows (``smart_resize`` of transformers). (width, height).
    """
    w, h = (round(n / factor) * factor for n in (width, height))
    if w * h > max_pixels:
        beta = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(n / beta / factor) * factor) for n in (width, height))
    elif w * h < min_pixels:
        beta = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(n * beta / factor) * factor for n in (width, height))
    if w * h <= max_pixels:
        return w, h
    # longer than 200 : 1, or bounds close together: transformers would go beyond max_pixels
    if w >= h:
        return max_pixels // h // factor * factor, h
    return w, max_pixels // w // factor * factor


def groups_of_four(patches: Patches) -> Int32:
    """Rows come in 2x2 groups; in windowed towers group g is the raster cell window[g]."""
    groups = np.arange(patches.rows * patches.columns, dtype=np.int32) // 4
    return groups if patches.window is None else patches.window[groups]


def dynamic(projector: Projector, name: str, source: str, least: int, full: tuple[int, ...] | None = None) -> Family:
    """A family of one tile, as large as the bounds allow; ``least`` tokens, which files do not carry, and ``full`` the
    blocks that attend to the whole tile, None for all.
    """
    mmproj = projector.header
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=False,
        merge=mmproj.integer("clip.vision.spatial_merge_size", 2),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
        full_layers=full,
    )
    cell, most = tower.patch * tower.merge, projector.max_tokens or MAX_TOKENS

    def cut(width: int, height: int) -> Cut:
        size = smart_resize(width, height, cell, min(least, most) * cell**2, most * cell**2)
        return [START, Block((whole(width, height, size, size[1] // cell, size[0] // cell),)), END]

    return Family(name, source, tower, cut, groups_of_four, bounds=(1, most))


def open_qwen2(projector: Projector) -> Family:
    """Qwen2-VL."""
    return dynamic(projector, "qwen2vl", f"2409.12191; {SOURCE}", least=4)


def open_qwen25(projector: Projector) -> Family:
    """Qwen2.5-VL: blocks attend within windows, but for every n_wa_pattern-th."""
    pattern = projector.header.integer("clip.vision.n_wa_pattern")
    blocks = projector.header.integer("clip.vision.block_count")
    full = tuple(i for i in range(blocks) if (i + 1) % pattern == 0) if pattern > 0 else None
    return dynamic(projector, "qwen2.5vl", f"2502.13923; {SOURCE}", least=4, full=full)


def open_qwen3(projector: Projector) -> Family:
    """Qwen3-VL; Qwen3.5 has the same tower without deepstack."""
    return dynamic(projector, "qwen3vl", f"2511.21631; {SOURCE}", least=64)
