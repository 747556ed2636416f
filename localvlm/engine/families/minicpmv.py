"""MiniCPM-V 4.6: the whole picture, then slices of it; a merger amid the tower and one at its end make 4 x 4 patches
one token (2 x 2 where the file says so). The resamplers of earlier MiniCPM-V have no place for their queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from localvlm.engine.families.base import NUMBER, Block, Cut, Family, Projector, Size, Tile, Tower, merged

__all__ = ["open_minicpmv46"]

MAX_SLICES = 9
"""``max_slice_nums`` of the published processor."""
ROUNDS = 8
"""More than any size from 1:80 to 80:1 needs to settle."""
INSERTED = 6
"""Block after which the merger stands, where the file does not say."""


def _multiple(length: float, of: int) -> int:
    return max(round(length / of) * of, of)


@dataclass(frozen=True)
class _Rule:
    """``side``: pixels of a slice if it is square; ``cell``: pixels of a token; ``merge``: patches of a token;
    ``most``: slices.
    """

    side: int
    cell: int
    merge: int
    most: int = MAX_SLICES

    def enlarged(self, width: float, height: float) -> Size:
        """About side^2 pixels at the same aspect."""
        aspect = width / height
        h = int(self.side / math.sqrt(aspect))
        return _multiple(int(h * aspect), self.cell), _multiple(h, self.cell)

    def kept(self, width: int, height: int) -> Size:
        """What llama.cpp's own preprocessor, which cannot be passed by, makes of a tile of multiples of ``cell``."""
        if self.merge == 2 or width * height > self.side**2:
            return self.enlarged(width, height)
        return (width, height) if max(width, height) > self.side else (self.side, self.side)

    def fitted(self, width: float, height: float) -> Size:
        """The size of a tile: :meth:`enlarged`, or the nearest one that llama.cpp leaves as it is."""
        size = self.enlarged(width, height)
        for _ in range(ROUNDS):
            size = self.kept(*size)
        return size

    def grid(self, width: int, height: int) -> Size:
        """(rows, columns) of slices; (0, 0): none."""
        n = min(math.ceil(width * height / self.side**2), self.most)
        if n <= 1:
            return 0, 0
        wanted = math.log(width / height)
        grids = [
            (rows, slices // rows)
            for slices in (n - 1, n, n + 1)
            if 1 < slices <= self.most
            for rows in range(1, slices + 1)
            if slices % rows == 0
        ]
        return min(grids, key=lambda g: (abs(wanted - math.log(g[1] / g[0])), -g[0]))


def _cut(width: int, height: int, rule: _Rule) -> Cut:
    """The whole picture always has about side^2 pixels: smaller ones are enlarged, and larger ones are sliced too."""

    def block(sizes: Size, x: int, y: int, size: Size) -> Block:
        crop = (x, y, x + size[0], y + size[1])
        return Block((Tile((sizes,), crop, size[1] // rule.cell, size[0] // rule.cell),))

    whole = rule.fitted(width, height)
    parts: list[str | Block] = [f"<image_id>{NUMBER}</image_id><image>", block(whole, 0, 0, whole)]
    rows, columns = rule.grid(width, height)
    if not rows:
        return [*parts, "</image>"]
    w, h = rule.fitted(_multiple(width, columns) / columns, _multiple(height, rows) / rows)
    before = "</image>"
    for r in range(rows):
        for c in range(columns):
            parts += [f"{before}<slice>", block((w * columns, h * rows), c * w, r * h, (w, h))]
            before = "</slice>" if c + 1 < columns else "</slice>\n"
    return [*parts, "</slice>"]


def open_minicpmv46(projector: Projector) -> Family | None:
    """Attention is recorded in the blocks before the merger, where rows still are patches. A bound on the tokens makes
    for fewer slices, each reckoned as square.
    """
    mmproj = projector.header
    blocks, merge = mmproj.integer("clip.vision.block_count"), mmproj.integer("clip.vision.projector.scale_factor", 4)
    inserted = next(iter(mmproj.integers("clip.vision.wa_layer_indexes")), INSERTED)
    tower = Tower(
        n_layer=min(inserted + 1, blocks) if merge == 4 else blocks,
        cls=False,
        merge=merge,
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
        n_block=blocks,
    )
    side, cell, most = tower.image_size, tower.patch * merge, MAX_SLICES
    if not 1 <= cell <= side or merge not in (2, 4):
        return None
    if projector.max_tokens:
        most = min(most, projector.max_tokens // (side // cell) ** 2 - 1)
    rule = _Rule(side, cell, merge, most)
    return Family(
        "minicpmv4.6",
        "image_processing_minicpmv4_6.py and processing_minicpmv4_6.py of transformers",
        tower,
        lambda width, height: _cut(width, height, rule),
        merged,
        text_positions=True,
    )
