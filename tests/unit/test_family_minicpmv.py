"""MiniCPM-V 4.6: the cut against numbers of transformers' image processor (5.23), and how a cut is spelled."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from localvlm.engine.families import NUMBER, Block, Family, Patches, Tile, describe, draw
from localvlm.engine.families.minicpmv import _Rule
from localvlm.engine.gguf_header import Header
from localvlm.engine.tower import VisionTower
from tests.unit.test_families import check_tile, ramps

# (width, height): the whole picture, the grid (columns, rows), a slice; sizes in tokens
NUMBERS = {
    (336, 336): ((8, 8), (0, 0), (0, 0)), (640, 480): ((9, 7), (2, 1), (7, 10)),
    (480, 640): ((7, 9), (1, 2), (10, 7)), (1920, 1080): ((11, 6), (4, 2), (8, 8)),
    (1080, 1920): ((6, 11), (2, 4), (8, 8)), (100, 160): ((6, 10), (0, 0), (0, 0)),
    (900, 1000): ((8, 8), (2, 2), (8, 8)), (1, 1): ((8, 8), (0, 0), (0, 0)), (65, 40): ((10, 6), (0, 0), (0, 0)),
    (448, 448): ((8, 8), (0, 0), (0, 0)), (449, 448): ((8, 8), (2, 1), (6, 11)),
    (500, 333): ((10, 7), (0, 0), (0, 0)), (4032, 3024): ((9, 7), (3, 3), (9, 7)),
    (1280, 720): ((11, 6), (3, 2), (9, 7)), (3000, 2900): ((8, 8), (3, 3), (8, 8)),
    (2000, 1200): ((10, 6), (4, 2), (7, 9)), (640, 900): ((7, 9), (2, 2), (7, 9)),
    (1500, 450): ((15, 4), (3, 1), (8, 8)),
}  # fmt: skip


def family(side: int = 448, patch: int = 14, merge: int = 4) -> Family:
    values = {
        "clip.projector_type": "minicpmv4_6",
        "clip.vision.block_count": 27,
        "clip.vision.patch_size": patch,
        "clip.vision.image_size": side,
        "clip.vision.projector.scale_factor": merge,
    }
    return describe(Header(Path("mmproj.gguf"), values, array_lengths={}, tensors={}))


def split(model: Family, width: int, height: int) -> tuple[list[str], list[Tile]]:
    assert model.cut is not None
    parts = model.cut(width, height)
    return [p for p in parts if isinstance(p, str)], [t for p in parts if isinstance(p, Block) for t in p.tiles]


def test_cut_is_that_of_transformers() -> None:
    for (width, height), (whole, (columns, rows), (w, h)) in NUMBERS.items():
        _, (first, *slices) = split(family(), width, height)
        assert (first.columns, first.rows) == whole, (width, height)
        assert first.sizes == ((whole[0] * 56, whole[1] * 56),)
        w, h = w * 56, h * 56
        assert [t.crop for t in slices] == [
            (c * w, r * h, c * w + w, r * h + h) for r in range(rows) for c in range(columns)
        ]
        assert all(t.sizes == ((w * columns, h * rows),) for t in slices)


def test_slices_come_after_the_picture_in_rows() -> None:
    texts, _ = split(family(), 640, 900)
    assert texts == [
        f"<image_id>{NUMBER}</image_id><image>",
        "</image><slice>",
        "</slice><slice>",
        "</slice>\n<slice>",
        "</slice><slice>",
        "</slice>",
    ]
    assert split(family(), 300, 400)[0] == [texts[0], "</image>"]


@pytest.mark.parametrize(("side", "cell", "merge", "share"), [(448, 56, 4, 0.01), (448, 28, 2, 0.07)])
def test_every_size_settles_and_few_differ(side: int, cell: int, merge: int, share: float) -> None:
    """llama.cpp must leave tiles as they are; between 1:2 and 2:1 they are those of transformers but for ``share``."""
    rule, differ = _Rule(side, cell, merge), 0
    aspects = np.exp(np.linspace(-math.log(80), math.log(80), 4001))
    for aspect in aspects:
        width, height = 3000 * math.sqrt(aspect), 3000 / math.sqrt(aspect)
        size = rule.fitted(width, height)
        assert rule.kept(*size) == size
        differ += 0.5 < aspect < 2 and size != rule.enlarged(width, height)
    assert differ / np.sum((aspects > 0.5) & (aspects < 2)) < share


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 1000), (700, 90), (1, 1), (450, 447)])
def test_boxes_are_where_tiles_are_drawn_from(width: int, height: int) -> None:
    _, tiles = split(family(64, 4), width, height)
    for tile, pixels in zip(tiles, draw(ramps(width, height), tiles), strict=True):
        check_tile(tile, pixels, width, height)


def test_the_attention_is_that_of_the_blocks_before_the_merger() -> None:
    assert family().tower.n_layer == 7
    assert family(merge=2).tower.n_layer == 27
    _, (tile, *_) = split(family(), 448, 448)
    owner = family().token_of_patch(Patches(32, 32, tile)).reshape(32, 32)
    np.testing.assert_array_equal(owner, np.arange(64).reshape(8, 8).repeat(4, axis=0).repeat(4, axis=1))


def test_each_row_takes_one_position_in_mrope_decoders_too() -> None:
    model = family()
    assert model.cut is not None
    block = next(p for p in model.cut(640, 480) if isinstance(p, Block))
    tower = cast(Any, SimpleNamespace(family=model, _model=SimpleNamespace(mrope=True)))
    places, n = VisionTower._relative(tower, block)
    assert n == block.n == 7 * 9
    np.testing.assert_array_equal(places, np.arange(n)[:, None].repeat(3, axis=1))


@pytest.mark.parametrize(("side", "patch", "merge"), [(0, 14, 4), (448, 0, 4), (448, 14, 3), (448, 14, 0)])
def test_sizes_that_make_no_token_are_left_to_llama_cpp(side: int, patch: int, merge: int) -> None:
    assert family(side, patch, merge).name == "unknown"
