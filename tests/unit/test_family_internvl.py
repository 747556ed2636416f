"""InternVL: the cut against numbers of transformers (5.23)."""

from __future__ import annotations

import pytest

from localvlm.engine.families import Block, Family, describe
from tests.unit.test_families import INTERNVL, header

# (width, height): columns and rows of tiles; from ``get_optimal_tiled_canvas``
CUTS = {
    (448, 448): (1, 1), (640, 480): (4, 3), (480, 640): (3, 4), (1920, 1080): (4, 2), (600, 1200): (1, 2),
    (100, 1000): (1, 10), (1000, 100): (10, 1), (1, 1): (1, 1), (1, 65): (1, 12), (65, 1): (12, 1), (336, 336): (1, 1),
    (896, 896): (2, 2), (1344, 1344): (3, 3), (896, 448): (2, 1), (1300, 650): (4, 2), (671, 672): (2, 2),
    (500, 333): (3, 2), (4032, 3024): (4, 3), (2000, 11): (12, 1), (640, 512): (4, 3),
}  # fmt: skip


def block_of(family: Family, width: int, height: int) -> Block:
    assert family.cut is not None
    start, block, end = family.cut(width, height)
    assert (start, end) == ("<img>", "</img>")
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize(("size", "grid"), CUTS.items())
def test_the_grid_is_that_of_transformers(size: tuple[int, int], grid: tuple[int, int]) -> None:
    (columns, rows), (*tiles, last) = grid, block_of(describe(header(INTERNVL)), *size).tiles
    corners = [(448 * c, 448 * r) for r in range(rows) for c in range(columns)]
    assert [t.crop[:2] for t in tiles] == (corners if len(corners) > 1 else [])
    assert all(t.sizes == ((448 * columns, 448 * rows),) for t in tiles)
    assert last.crop == (0, 0, 448, 448)
    assert last.sizes == (() if size == (448, 448) else ((448, 448),))
    assert {t.n for t in (*tiles, last)} == {256}


def test_the_file_and_the_bound_on_tokens_say_how_many_tiles() -> None:
    def n(values: dict[str, int], max_tokens: int = 0) -> int:
        return len(block_of(describe(header(INTERNVL | values), max_tokens), 640, 480).tiles)

    fewest, most = "clip.vision.preproc_min_tiles", "clip.vision.preproc_max_tiles"
    assert n({}) == 13
    assert n({most: 6}) == 7
    assert n({most: 4}) == n({most: 1}) == 1
    assert n({fewest: 2, most: 4}) == 5
    assert n({}, max_tokens=7 * 256) == 7
    assert n({}, max_tokens=7 * 256 - 1) == 1
    assert n({}, max_tokens=7) == 1
    for values in ({most: 0}, {fewest: 5, most: 4}, {most: 1 << 31}, {"clip.vision.patch_size": 0}):
        assert describe(header(INTERNVL | values)).name == "unknown"
