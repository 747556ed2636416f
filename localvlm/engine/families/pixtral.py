"""Pixtral (2410.07073) and Mistral Small 3: a picture of any size, [IMG_BREAK] after each row of tokens but the last,
[IMG_END] after the last.
"""

from __future__ import annotations

import math

import numpy as np

from localvlm.engine.families.base import Block, Cut, Family, Projector, Size, Tile, Tower, merged

__all__ = ["fit_edge", "open_pixtral"]

MAX_TOKENS = 1024
"""Tokens of a picture. The published bound is the longest edge alone, ``image_size``: 4096 tokens of Pixtral, 3025 of
Mistral Small 3.1, more than a laptop can attend to."""
END, BREAK = "[IMG_END]", "v.token_embd.img_break"
"""The tower's own rows of the break are not taken: llama.cpp makes them from memory that nothing was written to, times
0, which is NaN where that held one."""


def fit_edge(width: int, height: int, cell: int, edge: int) -> Size:
    """(columns, rows) of tokens of a picture whose longer side is brought to at most ``edge`` pixels; a begun cell is a
    whole one (``get_resize_output_image_size`` of transformers, which has no tokens for sides below one pixel).
    """
    ratio = max(height / edge, width / edge)
    if ratio > 1:
        width, height = (max(1, math.floor(n / ratio)) for n in (width, height))
    return (width - 1) // cell + 1, (height - 1) // cell + 1


def open_pixtral(projector: Projector) -> Family:
    """``spatial_merge_size`` is 2 for Mistral Small 3.1 and its descendants."""
    mmproj = projector.header
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=False,
        merge=mmproj.integer("clip.vision.spatial_merge_size", 1),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )
    cell = tower.patch * tower.merge
    most = projector.max_tokens or MAX_TOKENS

    def cut(width: int, height: int) -> Cut:
        edge = tower.image_size
        columns, rows = fit_edge(width, height, cell, edge)
        while columns * rows > most:
            edge -= cell
            columns, rows = fit_edge(width, height, cell, edge)
        size = (columns * cell, rows * cell)
        sizes = () if (width, height) == size else (size,)
        tile = Tile(sizes, (0, 0, *size), rows, columns, row_end=True)
        return [Block((tile,), np.where(tile.shows(), np.arange(tile.n), -1).astype(np.int32)), END]

    return Family(
        "pixtral",
        "2410.07073; transformers image_processing_pil_pixtral.py",
        tower,
        cut,
        merged,
        row_end=BREAK,
        bounds=(1, most),
    )
