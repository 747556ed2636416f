"""LLaVA-NeXT, LLaVA-1.6: the picture whole, then again in tiles at the best of a few resolutions, without the padding.

The tokens of all tiles form one raster, and a row end ("image newline") follows each of its rows. As transformers'
``LlavaNextImageProcessor`` and ``LlavaNextModel.pack_image_features`` have it; Granite Vision 3 is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localvlm.engine.families.base import Block, Cut, Family, Int32, Projector, Size, Tile, whole
from localvlm.engine.families.llava import PINPOINTS, clip_notes, clip_repairs, clip_tower
from localvlm.engine.gguf_header import Header

__all__ = ["best_resolution", "open_llava_next", "unpadded"]

MAX_TILES = 64
ROW_ENDS = ("v.image_newline", "model.image_newline")
"""What llama.cpp's loader and its converter call the row end."""


def best_resolution(width: int, height: int, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of a picture's pixels; of several that with the least padding, else the first."""

    def merit(size: Size) -> Size:
        scale = min(size[0] / width, size[1] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - size[0] * size[1]

    return max(resolutions, key=merit)


def fitted(width: int, height: int, size: Size) -> Size:
    """The picture's size once it fills ``size`` on one side and lies within it on the other."""
    across, down = size[0] / width, size[1] / height
    if across < down:
        return size[0], min(math.ceil(height * across), size[1])
    return min(math.ceil(width * down), size[0]), size[1]


def unpadded(width: int, height: int, rows: int, columns: int) -> tuple[slice, slice]:
    """Rows and columns of a raster of tokens that are not wholly on the padding around a width x height picture, by
    transformers' rounding.
    """
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(pad, rows - pad), slice(0, columns)
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(pad, columns - pad)


def raster(down: int, across: int, side: int) -> Int32:
    """(down * side, across * side) index of each token among those of ``down`` x ``across`` tiles, row by row."""
    index = np.arange(down * across * side * side, dtype=np.int32).reshape(down, across, side, side)
    return index.swapaxes(1, 2).reshape(down * side, across * side)


def _resolutions(mmproj: Header, tile: int, side: int, most: int) -> list[Size] | None:
    """(width, height) in pixels, of at most ``most`` tokens if not 0; None if the file's make no sense. The file has
    them as height, width.
    """
    flat = mmproj.integers(PINPOINTS)
    found = list(zip(flat[1::2], flat[::2], strict=False))
    if not found or len(flat) % 2 or tile < 1 or any(n < tile or n % tile for n in flat):
        return None
    tiles = [w * h // tile**2 for w, h in found]
    if max(tiles) > MAX_TILES:
        return None
    return [size for size, n in zip(found, tiles, strict=True) if not most or (n + 1) * side**2 <= most]


def open_llava_next(projector: Projector) -> Family:
    """LLaVA-NeXT with the merge "spatial_unpad", the only published one; others are left to llama.cpp. Resolutions of
    more tokens than the bound are left out; where none is left the picture is one tile.
    """
    mmproj = projector.header
    tower = clip_tower(mmproj)
    tile, side = tower.image_size, tower.image_size // max(tower.patch, 1)
    resolutions = _resolutions(mmproj, tile, side, projector.max_tokens)
    merge = mmproj.text("clip.vision.mm_patch_merge_type", "spatial_unpad")
    published = resolutions is not None and merge == "spatial_unpad"
    view = side * tower.patch, side * tower.patch
    row_end = next((name for name in ROW_ENDS if name in mmproj.tensors), "")

    def grid(width: int, height: int, size: Size) -> tuple[tuple[Tile, ...], Int32]:
        """Tiles, and the indices among their tokens that the prompt has, row by row."""
        inner = fitted(width, height, size)
        left, top = ((full - n) // 2 for full, n in zip(size, inner, strict=True))
        sizes = () if inner == (width, height) else (inner,)
        tiles = tuple(
            Tile(sizes, (x - left, y - top, x - left + tile, y - top + tile), side, side, view=view)
            for y in range(0, size[1], tile)
            for x in range(0, size[0], tile)
        )
        index = raster(size[1] // tile, size[0] // tile, side)
        return tiles, index[unpadded(width, height, *index.shape)]

    def cut(width: int, height: int) -> Cut:
        overview = replace(whole(width, height, (tile, tile), side, side), view=view)
        tiles: tuple[Tile, ...] = ()
        index = np.zeros((1, 0), np.int32)
        if resolutions:
            tiles, index = grid(width, height, best_resolution(width, height, resolutions))
        ends = np.full((len(index), 1 if row_end else 0), -1, np.int32)
        fine = np.hstack([index + np.int32(overview.n), ends]).reshape(-1)
        order = np.concatenate([np.arange(overview.n, dtype=np.int32), fine])
        return [Block((overview, *tiles), order)]

    notes = clip_notes(mmproj)
    if not published:
        notes += ("the projector file's tiles are not those of a published model: llama.cpp cuts pictures",)
    elif not row_end:
        notes += ("the projector file has no image_newline: the rows of tiles have no ends",)
    return Family(
        "llava-next",
        "llava-vl.github.io/blog/2024-01-30-llava-next; transformers, models/llava_next",
        tower,
        cut if published else None,
        row_end=row_end,
        repairs=clip_repairs(mmproj),
        notes=notes,
    )
