"""Where image tokens lie: boxes against pictures that are really letterboxed, as llama.cpp does it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localvlm.engine.families import FAMILIES, describe, raster_boxes
from localvlm.engine.gguf_header import Header, TensorInfo

SIZES = [
    (336, 336), (640, 480), (480, 640), (1920, 1080), (100, 1000), (1000, 100), (1, 1), (1, 65), (65, 1),
    (337, 335), (13, 7), (335, 336), (2000, 3), (3, 2000), (671, 672), (672, 671), (500, 333),
]  # fmt: skip


def letterbox(ramp: np.ndarray, side_w: int, side_h: int) -> np.ndarray:
    """``img_tool::resize`` of llama.cpp (tools/mtmd/mtmd-image.cpp, PAD_CEIL): in float32, ceil, centred, rest NaN."""
    height, width = ramp.shape
    scale = min(np.float32(side_w) / np.float32(width), np.float32(side_h) / np.float32(height))
    new_w = min(math.ceil(np.float32(width) * scale), side_w)
    new_h = min(math.ceil(np.float32(height) * scale), side_h)
    image = PIL.Image.fromarray(ramp, "F").resize((new_w, new_h), PIL.Image.Resampling.BOX)
    out = np.full((side_h, side_w), np.nan, np.float32)
    left, top = (side_w - new_w) // 2, (side_h - new_h) // 2
    out[top : top + new_h, left : left + new_w] = np.asarray(image)
    return out


def check(width: int, height: int, columns: int, rows: int, cell: int) -> None:
    boxes = raster_boxes(width, height, columns, rows, cell)
    assert boxes.shape == (rows * columns, 4)
    assert boxes.dtype == np.float32
    x, y = np.meshgrid(np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5)
    seen_x, seen_y = letterbox(x, columns * cell, rows * cell), letterbox(y, columns * cell, rows * cell)
    slack = 0.5 + 0.5 * max(width / (columns * cell), height / (rows * cell))  # BOX counts whole pixels
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        r, c = divmod(i, columns)
        at = slice(r * cell, (r + 1) * cell), slice(c * cell, (c + 1) * cell)
        shown = ~np.isnan(seen_x[at])
        assert (x1 > x0 and y1 > y0) == shown.any(), (i, boxes[i])
        if shown.any():
            assert abs(seen_x[at][shown].mean() - (x0 + x1) / 2) <= slack, (i, boxes[i])
            assert abs(seen_y[at][shown].mean() - (y0 + y1) / 2) <= slack, (i, boxes[i])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_input_with_padding(width: int, height: int) -> None:
    check(width, height, 24, 24, 14)


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 300)] * 2, *[st.integers(1, 8)] * 2, st.sampled_from([4, 14, 28]))
def test_any_raster(width: int, height: int, columns: int, rows: int, cell: int) -> None:
    check(width, height, columns, rows, cell)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_boxes_tile_the_picture_without_gap_or_overlap(width: int, height: int) -> None:
    boxes = raster_boxes(width, height, 24, 24, 14).astype(float)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert (area >= 0).all()
    assert area.sum() == pytest.approx(width * height, rel=1e-4)
    assert boxes.min() == 0
    assert boxes[:, 2].max() == width
    assert boxes[:, 3].max() == height


def header(values: dict, tensors: tuple[str, ...] = ("v.class_embd",), lengths: dict | None = None) -> Header:
    infos = {name: TensorInfo(name, (1,), 0, 0, 4) for name in tensors}
    values = {"clip.projector_type": "mlp", **values}
    return Header(Path("mmproj.gguf"), values, array_lengths=lengths or {}, tensors=infos)


def test_llava_runs_one_block_less_unless_the_file_says_which() -> None:
    values = {"clip.vision.block_count": 24, "clip.vision.patch_size": 14, "clip.vision.image_size": 336}
    family, tower = describe(header(values))
    assert (family.name, tower.n_layer, tower.cls, tower.merge, tower.patch) == ("llava", 23, True, 1, 14)
    assert describe(header({**values, "clip.vision.feature_layer": (23,)}))[1].n_layer == 23
    assert describe(header({**values, "clip.vision.feature_layer": (3, 8, 20)}))[1].n_layer == 20


def test_tiled_llava_has_no_token_map_yet() -> None:
    assert describe(header({}, lengths={"clip.vision.image_grid_pinpoints": 10}))[0].name == "unknown"


def test_qwen_merges_patches_and_unknown_projectors_are_unknown() -> None:
    values = {"clip.projector_type": "qwen2.5vl_merger", "clip.vision.block_count": 32}
    family, tower = describe(header(values, tensors=()))
    assert (family.name, tower.n_layer, tower.cls, tower.merge) == ("qwen2.5vl", 32, False, 2)
    assert describe(header({"clip.projector_type": "something new"}))[0].name == "unknown"
    assert describe(header({"clip.vision.projector_type": "something new"}))[0].name == "unknown"


def test_windowed_rows_map_to_raster_tokens() -> None:
    to_token = next(f for f in FAMILIES if f.name == "qwen2.5vl").token_of_patch
    assert to_token is not None
    window = np.array([2, 0, 3, 1], np.int32)
    want = [window[row // 4] for row in range(16)]
    np.testing.assert_array_equal(to_token(16, window), want)
    np.testing.assert_array_equal(to_token(16, None), np.arange(16) // 4)


def test_no_projector_is_in_two_families() -> None:
    names = [p for f in FAMILIES for p in f.projectors]
    assert len(names) == len(set(names))
    assert all(f.source for f in FAMILIES)
