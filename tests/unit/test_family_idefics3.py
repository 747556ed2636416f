"""Idefics3 and SmolVLM: the cut against numbers of transformers' image processor (5.23), and how a cut is spelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.families import Block, Family, Patches, Tile, describe, draw
from localvlm.engine.gguf_header import Header
from tests.unit.test_families import check_tile, ramps

# (width, height): the first resize, rows, columns; from ``get_resize_output_image_size`` and
# ``get_number_of_image_patches``
SMOLVLM = {
    (336, 336): (2048, 2048, 4, 4), (640, 480): (2048, 1536, 3, 4), (480, 640): (1536, 2048, 4, 3),
    (1920, 1080): (2048, 1152, 3, 4), (1080, 1920): (1152, 2048, 4, 3), (100, 1000): (204, 2048, 4, 1),
    (1000, 100): (2048, 204, 1, 4), (1, 1): (2048, 2048, 4, 4), (1, 65): (32, 2048, 4, 1), (65, 1): (2048, 32, 1, 4),
    (337, 335): (2048, 2036, 4, 4), (13, 7): (2048, 1102, 3, 4), (2000, 11): (2048, 12, 1, 4),
    (11, 2000): (12, 2048, 4, 1), (671, 672): (2044, 2048, 4, 4), (500, 333): (2048, 1364, 3, 4),
    (4032, 3024): (2048, 1536, 3, 4), (1024, 769): (2048, 1538, 4, 4), (1024, 768): (2048, 1536, 3, 4),
    (9000, 1): (2048, 1, 1, 4),
}  # fmt: skip
SMOLVLM_2B = {
    (336, 336): (1536, 1536, 4, 4), (640, 480): (1536, 1152, 3, 4), (480, 640): (1152, 1536, 4, 3),
    (1920, 1080): (1536, 864, 3, 4), (100, 1000): (154, 1536, 4, 1), (1, 65): (24, 1536, 4, 1),
    (337, 335): (1536, 1526, 4, 4), (13, 7): (1536, 828, 3, 4), (2000, 11): (1536, 8, 1, 4),
    (671, 672): (1534, 1536, 4, 4), (500, 333): (1536, 1022, 3, 4), (1024, 769): (1536, 1154, 4, 4),
    (1024, 768): (1536, 1152, 3, 4), (9000, 1): (1536, 1, 1, 4),
}  # fmt: skip
IDEFICS3 = {
    (336, 336): (1456, 1456, 4, 4), (640, 480): (1456, 1092, 3, 4), (480, 640): (1092, 1456, 4, 3),
    (1920, 1080): (1456, 820, 3, 4), (1080, 1920): (820, 1456, 4, 3), (1000, 100): (1456, 146, 1, 4),
    (65, 1): (1456, 22, 1, 4), (337, 335): (1456, 1448, 4, 4), (13, 7): (1456, 784, 3, 4), (11, 2000): (8, 1456, 4, 1),
    (500, 333): (1456, 970, 3, 4), (1024, 769): (1456, 1094, 4, 4), (9000, 1): (1456, 1, 1, 4),
}  # fmt: skip


def family(tile: int, patch: int, merge: int, edge: int = 0, max_tokens: int = 0) -> Family:
    values = {
        "clip.projector_type": "idefics3",
        "clip.vision.block_count": 12,
        "clip.vision.patch_size": patch,
        "clip.vision.image_size": tile,
        "clip.vision.projector.scale_factor": merge,
    }
    if edge:
        values["clip.vision.preproc_image_size"] = edge
    return describe(Header(Path("mmproj.gguf"), values, array_lengths={}, tensors={}), max_tokens)


def split(model: Family, width: int, height: int) -> tuple[list[str], list[Tile]]:
    assert model.cut is not None
    parts = model.cut(width, height)
    return [p for p in parts if isinstance(p, str)], [t for p in parts if isinstance(p, Block) for t in p.tiles]


@pytest.mark.parametrize(
    ("model", "tile", "numbers"),
    [
        (family(512, 16, 4, 2048), 512, SMOLVLM),
        (family(384, 14, 3), 384, SMOLVLM_2B),
        (family(364, 14, 2), 364, IDEFICS3),
    ],
    ids=["smolvlm", "smolvlm-2b", "idefics3"],
)
def test_cut_is_that_of_transformers(model: Family, tile: int, numbers: dict) -> None:
    for (width, height), (w, h, rows, columns) in numbers.items():
        _, tiles = split(model, width, height)
        places = [(c * tile, r * tile) for r in range(rows) for c in range(columns)]
        assert [t.crop[:2] for t in tiles] == [*places, (0, 0)], (width, height)
        chain = ((w, h), (columns * tile, rows * tile))
        assert [t.sizes for t in tiles] == [chain] * len(places) + [(*chain, (tile, tile))]
        assert all(t.crop[2] - t.crop[0] == t.crop[3] - t.crop[1] == tile for t in tiles)


def test_each_row_ends_and_the_whole_picture_comes_last() -> None:
    texts, _ = split(family(512, 16, 4), 400, 200)
    fake = "<fake_token_around_image>"
    first = [f"{fake}<row_1_col_{c}>" for c in range(1, 5)]
    second = [f"{fake}<row_2_col_{c}>" for c in range(1, 5)]
    assert texts == [*first, "\n" + second[0], *second[1:], f"\n\n{fake}<global-img>", fake]


def test_a_picture_of_one_tile_is_not_split() -> None:
    fake = "<fake_token_around_image>"
    texts, tiles = split(family(512, 16, 4, 512), 400, 200)
    assert texts == [f"{fake}<global-img>", fake]
    assert [t.sizes for t in tiles] == [((512, 256), (512, 512))]


@pytest.mark.parametrize(
    ("most", "tiles"), [(0, 13), (13 * 64, 13), (832 - 1, 7), (7 * 64 - 1, 5), (5 * 64 - 1, 1), (64, 1), (1, 1)]
)
def test_fewer_tokens_make_the_longest_edge_shorter(most: int, tiles: int) -> None:
    assert len(split(family(512, 16, 4, max_tokens=most), 640, 400)[1]) == tiles


def test_the_strip_that_is_no_whole_patch_is_not_shown() -> None:
    _, tiles = split(family(384, 14, 3), 768, 384)
    boxes = tiles[-1].boxes(768, 384)
    np.testing.assert_allclose(boxes[-1], [8 * 42 * 2, 8 * 42, 378 * 2, 378])
    for tile, pixels in zip(tiles, draw(ramps(768, 384), tiles), strict=True):
        check_tile(tile, pixels, 768, 384)


def test_patches_of_a_token_are_a_square() -> None:
    model = family(52, 8, 3)
    _, tiles = split(model, 10, 10)
    owner = model.token_of_patch(Patches(6, 6, tiles[0])).reshape(6, 6)
    np.testing.assert_array_equal(owner, np.array([[0, 1], [2, 3]]).repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(("tile", "patch", "merge"), [(0, 14, 2), (364, 0, 2), (364, 14, 0), (14, 14, 2), (-1, -1, -1)])
def test_sizes_that_make_no_token_are_left_to_llama_cpp(tile: int, patch: int, merge: int) -> None:
    assert family(tile, patch, merge).name == "unknown"
