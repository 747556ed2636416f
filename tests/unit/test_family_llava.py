"""LLaVA and LLaVA-NeXT: the cut against numbers of transformers (5.23), and towers that lack a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.engine.families import Block, Family, describe
from localvlm.engine.families.llava_next import best_resolution, fitted, unpadded
from tests import zoo
from tests.unit.test_families import NEXT, header
from tests.zoo import llava15

PINPOINTS = NEXT["clip.vision.image_grid_pinpoints"]
# (width, height): the resolution's width and height, rows and columns of tokens left of padding; from
# ``select_best_resolution`` and ``unpad_image``
CUTS = {
    (336, 336): (672, 336, 24, 24), (640, 480): (672, 672, 36, 48), (480, 640): (672, 672, 48, 36),
    (1920, 1080): (672, 672, 28, 48), (100, 1000): (336, 1008, 72, 8), (1000, 100): (1008, 336, 8, 72),
    (1, 1): (672, 336, 24, 24), (1, 65): (672, 336, 24, 0), (65, 1): (672, 336, 0, 48), (337, 335): (672, 336, 24, 24),
    (13, 7): (672, 336, 24, 44), (2000, 11): (1008, 336, 0, 72), (11, 2000): (336, 1008, 72, 0),
    (671, 672): (672, 672, 48, 48), (672, 671): (672, 672, 48, 48), (500, 333): (672, 336, 24, 36),
    (4032, 3024): (672, 672, 36, 48), (1, 2000): (672, 336, 24, 0), (1008, 337): (1008, 336, 24, 72),
}  # fmt: skip


def next_family(max_tokens: int = 0, **values: object) -> Family:
    return describe(header(NEXT | values, ("v.class_embd", "model.image_newline")), max_tokens)


def block_of(family: Family, width: int, height: int) -> Block:
    assert family.cut is not None
    (block,) = family.cut(width, height)
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize(("size", "numbers"), CUTS.items())
def test_resolution_and_padding_are_those_of_transformers(size: tuple[int, int], numbers: tuple[int, ...]) -> None:
    resolutions = list(zip(PINPOINTS[1::2], PINPOINTS[::2], strict=True))
    best = best_resolution(*size, resolutions)
    rows, columns = unpadded(*size, best[1] // 14, best[0] // 14)
    left = rows.stop - rows.start, columns.stop - columns.start
    assert (*best, *left) == numbers
    block = block_of(next_family(), *size)
    assert len(block.tiles) == 1 + best[0] * best[1] // 336**2
    assert block.n == 576 + left[0] * (left[1] + 1)
    assert int((~block.shows()).sum()) == left[0]
    inner = fitted(*size, best)
    assert best[0] in inner or best[1] in inner


def test_tokens_of_tiles_are_one_raster_in_the_picture_s_order() -> None:
    block = block_of(next_family(), 640, 480)
    boxes = block.boxes(640, 480)[576:].reshape(36, 49, 4)
    assert not boxes[:, 48].any()
    tokens = boxes[:, :48]
    np.testing.assert_allclose(tokens[:, 1:, 0], tokens[:, :-1, 2], atol=1e-3)
    np.testing.assert_allclose(tokens[1:, :, 1], tokens[:-1, :, 3], atol=1e-3)
    assert (tokens[0, 0, :2].tolist(), tokens[-1, -1, 2:].tolist()) == ([0, 0], [640, 480])


@pytest.mark.parametrize(("most", "n", "tiles"), [(0, 2928, 5), (2880, 2928, 5), (2879, 1176, 3), (600, 577, 1)])
def test_a_bound_on_tokens_leaves_resolutions_out(most: int, n: int, tiles: int) -> None:
    block = block_of(next_family(most), 672, 672)
    assert (block.n, len(block.tiles)) == (n, tiles)


def test_odd_files_are_left_to_llama_cpp_or_say_what_they_lack() -> None:
    family = next_family()
    assert (family.name, family.row_end, family.notes) == ("llava-next", "model.image_newline", ())
    bare = describe(header(NEXT))
    assert "image_newline" in bare.notes[0]
    assert block_of(bare, 640, 480).n == 576 + 36 * 48
    for odd in ((336,), (335, 336), (0, 336), (336 * 65, 336), ()):
        assert next_family(**{"clip.vision.image_grid_pinpoints": odd}).cut is None
    flat = next_family(**{"clip.vision.mm_patch_merge_type": "flat"})
    assert (flat.name, flat.cut, flat.repairs) == ("llava-next", None, ("llava-cls-order",))
    assert "llama.cpp cuts" in flat.notes[0]


@pytest.mark.parametrize(
    ("width", "blocks", "said", "layers", "repaired"),
    [(1024, 23, (), 23, True), (1024, 24, (), 23, False), (1024, 23, (23,), 23, False), (1152, 26, (), 26, True),
     (1152, 27, (4, 8, 16, 27), 27, False), (768, 11, (), 11, True),
     (1280, 31, (), 31, True), (999, 23, (), 22, False)],
)  # fmt: skip
def test_a_dropped_block_is_known_by_the_tower_s_width(
    width: int, blocks: int, said: tuple[int, ...], layers: int, repaired: bool
) -> None:
    values = {"clip.vision.block_count": blocks, "clip.vision.embedding_length": width}
    if said:
        values["clip.vision.feature_layer"] = said
    family = describe(header(values))
    assert family.tower.n_layer == layers
    assert ("llava-last-block" in family.repairs) is repaired
    assert bool(family.notes) is (width == 999)


def test_a_siglip_tower_gets_its_gelu_where_the_file_has_clip_s_and_its_boxes_end_with_its_patches() -> None:
    values = NEXT | {
        "clip.vision.image_size": 384,
        "clip.vision.image_grid_pinpoints": (384, 384, 384, 768),
        "clip.vision.feature_layer": (4, 8, 16, 27),
    }
    family = describe(header(values, ("model.image_newline",)))
    assert (family.tower.n_layer, family.tower.cls, family.repairs) == (27, False, ("siglip-gelu",))
    assert describe(header(values | {"clip.use_gelu": True}, ("model.image_newline",))).repairs == ()
    boxes = block_of(family, 768, 384).boxes(768, 384)
    assert boxes.shape == (729 + 27 * 55, 4)
    assert boxes[728].tolist() == [26 * 28, 26 * 14, 756, 378]  # the overview is half as wide
    assert boxes[729 + 27].tolist() == [384, 0, 398, 14]  # the second tile's first


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


def test_a_dropped_block_runs_again(engine: Engine, tmp_path: Path) -> None:
    """CLIP-B's width and depth, of which the file lacks a block, against a file that says which layer is used."""
    text = zoo.build("llava15", tmp_path).model
    vision = llava15.VisionConfig(hidden=768, layers=12, heads=12, ffn=16, image=28)
    row = llava15.make_row("short", llava15.ROW.text, vision, seed=18)
    weights = row.weights()
    image = row.cases[0].images[0].pixels()
    rows, towers = {}, {}
    for name, blocks, stock in (("right", "explicit", False), ("mended", "dropped", False), ("stock", "dropped", True)):
        mmproj = tmp_path / f"{blocks}.gguf"
        if not mmproj.exists():
            llava15.write_mmproj(llava15.ROW.text, vision, mmproj, weights, blocks=blocks)
        vlm = engine.load(text, mmproj, LoadOptions(threads=1, stock_tower=stock))
        picture = vlm.encode(image, tower=True)
        rows[name], towers[name] = vlm.embeddings(picture), picture.tower
        assert ("llava-last-block" in vlm.info.repairs) is (name == "mended")
        assert vlm.info.tower_layers == 11 - stock
        vlm.close()
    assert np.array_equal(rows["mended"], rows["right"])
    assert np.array_equal(towers["mended"], towers["right"])
    assert np.isfinite(towers["stock"]).all()
    assert not np.allclose(rows["stock"], rows["right"], atol=0.1)
