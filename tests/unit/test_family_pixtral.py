"""Pixtral and Mistral Small 3.1: sizes as transformers' processor makes them."""

from __future__ import annotations

import numpy as np
import pytest

from localvlm.engine.families import Block, describe
from localvlm.engine.families.pixtral import fit_edge
from tests.unit.test_families import PIXTRAL, header

PICTURES = ((640, 480), (1920, 1080), (333, 1025), (1025, 333), (16, 17), (3999, 2711), (1540, 1541))
PUBLISHED = {
    (16, 1024): ((40, 30), (64, 36), (21, 64), (64, 21), (1, 2), (64, 44), (64, 64)),
    (28, 1540): ((23, 18), (55, 31), (12, 37), (37, 12), (1, 1), (55, 38), (55, 55)),
}
"""(cell, longest edge) -> (columns, rows) by ``get_resize_output_image_size``."""


@pytest.mark.parametrize(("cell", "edge"), PUBLISHED)
def test_sizes_are_transformers_s(cell: int, edge: int) -> None:
    assert tuple(fit_edge(*picture, cell, edge) for picture in PICTURES) == PUBLISHED[cell, edge]


@pytest.mark.parametrize("most", [1, 7, 100, 1024, 4096])
@pytest.mark.parametrize(("width", "height"), [*PICTURES, (4000, 3), (1, 1)])
def test_fewer_tokens_keep_the_aspect(width: int, height: int, most: int) -> None:
    family = describe(header(PIXTRAL, tensors=()), most)
    assert family.cut is not None
    block, end = family.cut(width, height)
    assert isinstance(block, Block)
    assert end == "[IMG_END]"
    (tile,) = block.tiles
    n = tile.rows * tile.columns
    assert n == int(block.shows().sum()) <= most
    assert block.n == n + tile.rows - 1
    assert block.order is not None
    assert np.array_equal(block.order < 0, ~tile.shows())  # row ends come from the file
    if most == 4096:
        assert (tile.columns, tile.rows) == fit_edge(width, height, 16, 1024)
    elif n > 50 and 0.2 < width / height < 5:
        assert abs(tile.columns / tile.rows / (width / height) - 1) < 0.2
