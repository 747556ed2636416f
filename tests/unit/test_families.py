"""Where image tokens lie: boxes against ramps that are really drawn through each family's tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.families import FAMILIES, Block, Family, Patches, Tile, describe, draw
from localvlm.engine.families.qwen import groups_of_four, smart_resize
from localvlm.engine.gguf_header import Header, TensorInfo

SIZES = [
    (336, 336), (640, 480), (480, 640), (1920, 1080), (100, 1000), (1000, 100), (1, 1), (1, 65), (65, 1),
    (337, 335), (13, 7), (335, 336), (2000, 11), (11, 2000), (671, 672), (672, 671), (500, 333),
]  # fmt: skip


def header(values: dict, tensors: tuple[str, ...] = ("v.class_embd",)) -> Header:
    infos = {name: TensorInfo(name, (1,), 0, 0, 4) for name in tensors}
    values = {"clip.projector_type": "mlp", **values}
    lengths = {key: len(value) for key, value in values.items() if isinstance(value, tuple)}
    return Header(Path("mmproj.gguf"), values, array_lengths=lengths, tensors=infos)


def test_llava_runs_one_block_less_unless_the_file_says_which() -> None:
    values = {"clip.vision.block_count": 24, "clip.vision.patch_size": 14, "clip.vision.image_size": 336}
    family = describe(header(values))
    tower = family.tower
    assert (family.name, tower.n_layer, tower.cls, tower.merge, tower.patch) == ("llava", 23, True, 1, 14)
    assert describe(header({**values, "clip.vision.feature_layer": (23,)})).tower.n_layer == 23
    assert describe(header({**values, "clip.vision.feature_layer": (3, 8, 20)})).tower.n_layer == 20


def test_qwen_merges_patches_and_unknown_projectors_are_unknown() -> None:
    values = {"clip.projector_type": "qwen2.5vl_merger", "clip.vision.block_count": 32}
    family = describe(header(values, tensors=()))
    tower = family.tower
    assert (family.name, tower.n_layer, tower.cls, tower.merge) == ("qwen2.5vl", 32, False, 2)
    assert describe(header({"clip.projector_type": "something new"})).name == "unknown"
    assert describe(header({"clip.vision.projector_type": "something new"})).name == "unknown"


def test_windowed_rows_map_to_raster_tokens() -> None:
    window, tile = np.array([2, 0, 3, 1], np.int32), Tile((), (0, 0, 56, 56), 2, 2)
    want = [window[row // 4] for row in range(16)]
    np.testing.assert_array_equal(groups_of_four(Patches(4, 4, tile, window)), want)
    np.testing.assert_array_equal(groups_of_four(Patches(4, 4, tile)), np.arange(16) // 4)


LLAVA = {"clip.vision.block_count": 24, "clip.vision.patch_size": 14, "clip.vision.image_size": 336}
NEXT = LLAVA | {
    "clip.vision.embedding_length": 1024,
    "clip.vision.image_grid_pinpoints": (336, 672, 672, 336, 672, 672, 1008, 336, 336, 1008),
}
QWEN25 = {"clip.projector_type": "qwen2.5vl_merger", "clip.vision.block_count": 32, "clip.vision.patch_size": 14}
QWEN2 = QWEN25 | {"clip.projector_type": "qwen2vl_merger"}
QWEN3 = QWEN25 | {"clip.projector_type": "qwen3vl_merger", "clip.vision.patch_size": 16}
SMOLVLM = {
    "clip.projector_type": "idefics3",
    "clip.vision.block_count": 12,
    "clip.vision.patch_size": 16,
    "clip.vision.image_size": 128,
    "clip.vision.projector.scale_factor": 4,
}
INTERNVL = LLAVA | {
    "clip.projector_type": "internvl",
    "clip.vision.image_size": 448,
    "clip.vision.projector.scale_factor": 2,
}
GEMMA3 = LLAVA | {"clip.projector_type": "gemma3", "clip.vision.image_size": 896}
PIXTRAL = {
    "clip.projector_type": "pixtral",
    "clip.vision.block_count": 24,
    "clip.vision.patch_size": 16,
    "clip.vision.image_size": 1024,
}
MISTRAL3 = PIXTRAL | {
    "clip.vision.patch_size": 14,
    "clip.vision.image_size": 1540,
    "clip.vision.spatial_merge_size": 2,
}
CUTTING = {
    "gemma3": describe(header(GEMMA3, tensors=())),
    "internvl": describe(header(INTERNVL)),
    "llava": describe(header(LLAVA)),
    "llava-next": describe(header(NEXT, ("v.class_embd", "model.image_newline"))),
    "mistral3": describe(header(MISTRAL3, tensors=())),
    "pixtral": describe(header(PIXTRAL, tensors=())),
    "qwen2.5vl": describe(header(QWEN25, tensors=())),
    "qwen2vl": describe(header(QWEN2, tensors=())),
    "qwen3vl": describe(header(QWEN3, tensors=())),
    "smolvlm": describe(header(SMOLVLM, tensors=())),
}


def ramps(width: int, height: int) -> np.ndarray:
    """(height, width, 3): red grows with x, green with y, blue is full."""
    out = np.full((height, width, 3), 255, np.uint8)
    out[..., 0] = (255 * (np.arange(width) + 0.5) / width)[None, :]
    out[..., 1] = (255 * (np.arange(height) + 0.5) / height)[:, None]
    return out


def check_tile(tile: Tile, pixels: np.ndarray, width: int, height: int) -> None:
    """What a cell shows has the colour of the middle of its box, and nothing shows where the box is empty."""
    boxes = tile.boxes(width, height).astype(float)[tile.shows()]
    cell_h, cell_w = pixels.shape[0] // tile.rows, pixels.shape[1] // tile.columns
    pixels = pixels[: tile.rows * cell_h, : tile.columns * cell_w]  # the tower drops what is no whole patch
    cells = pixels.reshape(tile.rows, cell_h, tile.columns, cell_w, 3).swapaxes(1, 2).astype(float)
    for box, cell in zip(boxes, cells.reshape(-1, cell_h, cell_w, 3), strict=True):
        shown = cell[..., 2] > 250
        if box[2] <= box[0] or box[3] <= box[1]:
            assert shown.mean() < 0.1, box
        elif shown.any():
            middle = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
            found = cell[shown][:, :2].mean(0) / 255
            assert np.abs(found - middle).max() < 0.02 + 0.6 / min(width, height), (box, found, middle)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("family", CUTTING.values(), ids=lambda f: f.name)
def test_boxes_are_where_tiles_are_drawn_from(family: Family, width: int, height: int) -> None:
    assert family.cut is not None
    picture = ramps(width, height)
    blocks = [part for part in family.cut(width, height) if isinstance(part, Block)]
    tiles = [tile for block in blocks for tile in block.tiles]
    for tile, pixels in zip(tiles, draw(picture, tiles), strict=True):
        x0, y0, x1, y1 = tile.crop
        assert pixels.shape == (y1 - y0, x1 - x0, 3)
        check_tile(tile, pixels, width, height)
    assert all(block.boxes(width, height).shape == (block.n, 4) for block in blocks)
    boxes = np.concatenate([block.boxes(width, height) for block in blocks])
    assert (boxes[:, :2].min(), boxes[:, 2].max(), boxes[:, 3].max()) == (0, width, height)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_smart_resize_keeps_its_bounds(width: int, height: int) -> None:
    w, h = smart_resize(width, height, 28, 4 * 784, 1024 * 784)
    assert w % 28 == h % 28 == 0
    assert w * h <= 1024 * 784
    assert w * h >= 4 * 784
    if 10 < width / height * 10 < 100 and width * height > 28**2 * 50:
        assert abs(np.log((w / h) / (width / height))) < 0.3


def test_every_family_says_its_source() -> None:
    assert all(f.source for f in CUTTING.values())
    assert all(openers for openers in FAMILIES.values())
