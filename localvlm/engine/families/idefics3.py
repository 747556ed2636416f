"""Idefics3 (2408.12637) and SmolVLM (2504.05299): rows of square tiles, then the whole picture as one more tile;
pixel shuffle merges s x s patches into one token.
"""

from __future__ import annotations

import math

from localvlm.engine.families.base import Block, Cut, Family, Projector, Size, Tile, Tower, merged

__all__ = ["open_idefics3"]

LONGEST = 4
"""The picture's longest edge in tiles, where the file does not say: transformers' default, and true of all published
models.
"""
LARGEST = 4096
"""Pixels of the longest edge that transformers never goes beyond."""
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"


def _enlarged(width: int, height: int, edge: int) -> Size:
    """The longest side becomes ``edge``; the other one keeps the aspect, made even."""
    aspect = width / height
    if width >= height:
        other = int(edge / aspect)
        return edge, max(other + other % 2, 1)
    other = int(edge * aspect)
    return max(other + other % 2, 1), edge


def _tiled(width: int, height: int, tile: int) -> Size:
    """Both sides as multiples of ``tile``, rounded up."""
    aspect = width / height
    if width >= height:
        w = math.ceil(width / tile) * tile
        return w, math.ceil(int(w / aspect) / tile) * tile
    h = math.ceil(height / tile) * tile
    return math.ceil(int(h * aspect) / tile) * tile, h


def _cut(width: int, height: int, tower: Tower, edge: int) -> list[str | Block]:
    """Tiles row by row with their place in words, then the whole picture, made of the enlarged one."""
    tile, tokens = tower.image_size, tower.image_size // tower.patch // tower.merge
    covered = tokens * tower.merge * tower.patch
    first = _enlarged(width, height, edge)
    second = _tiled(*first, tile)

    def block(sizes: tuple[Size, ...], x: int, y: int) -> Block:
        crop, view = (x, y, x + tile, y + tile), (covered, covered)
        return Block((Tile(sizes, crop, tokens, tokens, resample="LANCZOS", view=view),))

    parts: list[str | Block] = []
    rows, columns = second[1] // tile, second[0] // tile
    if rows * columns == 1:
        return [f"{FAKE}{GLOBAL}", block((first, second), 0, 0), FAKE]
    for r in range(rows):
        for c in range(columns):
            end = "\n" if r and not c else ""
            parts += [f"{end}{FAKE}<row_{r + 1}_col_{c + 1}>", block((first, second), c * tile, r * tile)]
    return [*parts, f"\n\n{FAKE}{GLOBAL}", block((first, second, (tile, tile)), 0, 0), FAKE]


def open_idefics3(projector: Projector) -> Family | None:
    """A bound on the tokens makes the longest edge shorter by whole tiles."""
    mmproj = projector.header
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=False,
        merge=mmproj.integer("clip.vision.projector.scale_factor", 2),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )
    tile = tower.image_size
    if min(tile, tower.patch, tower.merge) < 1 or tile < tower.patch * tower.merge:
        return None
    longest = min(mmproj.integer("clip.vision.preproc_image_size") or LONGEST * tile, LARGEST)
    per_tile = (tile // tower.patch // tower.merge) ** 2

    def cut(width: int, height: int) -> Cut:
        for edge in range(longest, 0, -tile):
            parts = _cut(width, height, tower, edge)
            blocks = sum(isinstance(p, Block) for p in parts)
            if not projector.max_tokens or blocks * per_tile <= projector.max_tokens or edge <= tile:
                break
        return parts

    return Family(
        "idefics3",
        "2408.12637; image_processing_idefics3.py and processing_idefics3.py of transformers",
        tower,
        cut,
        merged,
        bounds=(-1, per_tile),
    )
