"""Qwen2-VL to Qwen3-VL: sizes against numbers of transformers' image processor (5.23), and how a cut is spelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.families import Block, Family, describe
from localvlm.engine.families.qwen import smart_resize
from localvlm.engine.gguf_header import Header

# (width, height): ``smart_resize`` within 4 to 1024 tokens of 28 pixels, and within 64 to 1024 of 32
SIZES = {
    (640, 480): ((644, 476), (640, 480)), (1920, 1080): ((1176, 672), (1344, 768)),
    (1080, 1920): ((672, 1176), (768, 1344)), (4032, 3024): ((1008, 756), (1152, 864)),
    (3000, 20): ((2996, 28), (3008, 32)), (20, 3000): ((28, 2996), (32, 3008)), (13, 2000): ((28, 700), (32, 3200)),
    (70, 98): ((56, 112), (224, 320)), (100, 100): ((112, 112), (256, 256)), (300, 200): ((308, 196), (320, 224)),
    (1, 1): ((56, 56), (256, 256)), (1000, 7): ((672, 28), (3072, 32)),
}  # fmt: skip


def family(projector: str, patch: int, max_tokens: int = 0) -> Family:
    values = {"clip.projector_type": projector, "clip.vision.block_count": 24, "clip.vision.patch_size": patch}
    return describe(Header(Path("mmproj.gguf"), values, array_lengths={}, tensors={}), max_tokens)


def block(model: Family, width: int, height: int) -> Block:
    assert model.cut is not None
    start, tokens, end = model.cut(width, height)
    assert (start, end) == ("<|vision_start|>", "<|vision_end|>")
    assert isinstance(tokens, Block)
    return tokens


@pytest.mark.parametrize(
    ("projector", "name", "patch", "which"),
    [
        ("qwen2vl_merger", "qwen2vl", 14, 0),
        ("qwen2.5vl_merger", "qwen2.5vl", 14, 0),
        ("qwen3vl_merger", "qwen3vl", 16, 1),
    ],
)
def test_sizes_are_those_of_transformers(projector: str, name: str, patch: int, which: int) -> None:
    model = family(projector, patch)
    assert (model.name, model.tower.merge, model.tower.full_layers) == (name, 2, None)
    for (width, height), want in SIZES.items():
        found = block(model, width, height)
        (tile,) = found.tiles
        assert tile.crop == (0, 0, *want[which])
        assert found.raster == (want[which][1] // (2 * patch), want[which][0] // (2 * patch))


@pytest.mark.parametrize("most", [1, 3, 5, 16, 100, 1024])
def test_no_picture_goes_beyond_the_bound(most: int) -> None:
    random = np.random.RandomState(0)
    for width, height in (10 ** random.uniform(0, 5, (200, 2))).astype(int).tolist():
        for least, factor in ((4, 28), (64, 32)):
            w, h = smart_resize(width, height, factor, min(least, most) * factor**2, most * factor**2)
            assert min(w, h) >= factor
            assert w % factor == h % factor == 0
            assert w * h <= most * factor**2, (width, height)
    assert all(block(family("qwen3vl_merger", 16, most), *size).n <= most for size in SIZES)


def test_windowed_blocks_are_told_from_full_ones() -> None:
    values = {"clip.projector_type": "qwen2.5vl_merger", "clip.vision.block_count": 32, "clip.vision.n_wa_pattern": 8}
    model = describe(Header(Path("mmproj.gguf"), values, array_lengths={}, tensors={}))
    assert model.tower.full_layers == (7, 15, 23, 31)
