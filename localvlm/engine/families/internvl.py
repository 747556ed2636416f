"""InternVL (2404.16821) and its successors: as many square tiles as fit the picture's aspect, then the whole picture as
one more tile; pixel shuffle merges s x s patches into one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from localvlm.engine.families.base import Block, Cut, Family, Projector, Size, Tile, Tower, merged, whole

__all__ = ["closest", "open_internvl"]

LEAST, MOST = 1, 12
"""Tiles without the last one, where the file does not say: the published models' own."""
ABSURD = 1024
"""More tiles than any model has."""
START, END = "<img>", "</img>"


def _grids(least: int, most: int) -> list[Size]:
    """(columns, rows) of least..most tiles, fewest tiles first, then fewest columns."""
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= least]
    return sorted(grids, key=math.prod)


def closest(width: int, height: int, side: int, grids: Sequence[Size]) -> Size:
    """The grid whose aspect is nearest the picture's; of equals the largest that the picture fills by half."""
    best, nearest = (1, 1), math.inf
    for columns, rows in grids:
        off = abs(width / height - columns / rows)
        if off < nearest or (off == nearest and width * height > 0.5 * side * side * columns * rows):
            best, nearest = (columns, rows), off
    return best


def open_internvl(projector: Projector) -> Family | None:
    """A bound on the tokens makes for fewer tiles."""
    mmproj = projector.header
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=True,
        merge=mmproj.integer("clip.vision.projector.scale_factor", 1),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )
    least = mmproj.integer("clip.vision.preproc_min_tiles", LEAST)
    most = mmproj.integer("clip.vision.preproc_max_tiles", MOST)
    side, cell = tower.image_size, tower.patch * tower.merge
    if not (1 <= least <= most <= ABSURD and 1 <= cell <= side):
        return None
    n = side // cell
    if projector.max_tokens:
        most = max(1, min(most, projector.max_tokens // n**2 - 1))
    grids = _grids(min(least, most), most)

    def cut(width: int, height: int) -> Cut:
        columns, rows = closest(width, height, side, grids)
        thumbnail = whole(width, height, (side, side), n, n)
        if columns * rows == 1:
            return [START, Block((thumbnail,)), END]
        size = (columns * side, rows * side)
        corners = [(c * side, r * side) for r in range(rows) for c in range(columns)]
        tiles = [Tile((size,), (x, y, x + side, y + side), n, n) for x, y in corners]
        return [START, Block((*tiles, thumbnail)), END]

    return Family(
        "internvl",
        "2404.16821; image_processing_got_ocr2.py and processing_internvl.py of transformers",
        tower,
        cut,
        merged,
        repairs=("internvl-positions",),
    )
