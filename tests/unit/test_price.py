"""A tile's price: multiplications of the tower over those of a token, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from localvlm.engine.client import Engine
from localvlm.engine.families import Tower
from localvlm.engine.gguf_header import Header, TensorInfo
from localvlm.engine.price import tile_price
from localvlm.errors import UnsupportedModel
from tests import zoo
from tests.asking import load

TOWER = Tower(n_layer=2, cls=False, merge=2, patch=14, image_size=56)
TOWER_TENSORS = {
    "v.patch_embd.weight": (14, 14, 3, 8),
    "v.position_embd.weight": (8, 16),
    "v.blk.0.attn_q.weight": (8, 8),
    "v.blk.1.ffn_up.weight": (8, 20),
    "v.blk.1.ffn_up.bias": (20,),
    "mm.0.weight": (32, 6),
}


def header(architecture: str, tensors: dict[str, tuple[int, ...]], **values: int) -> Header:
    named = {key.replace("__", "."): value for key, value in values.items()}
    infos = {name: TensorInfo(name, shape, 0, 0, 0) for name, shape in tensors.items()}
    return Header(Path("x.gguf"), {"general.architecture": architecture, **named}, tensors=infos)


PROJECTOR = header("clip", TOWER_TENSORS, clip__vision__embedding_length=8, clip__vision__block_count=2)


def test_it_counts_blocks_attention_and_projector() -> None:
    model = header("llama", {"token_embd.weight": (6, 100), "blk.0.attn_q.weight": (6, 6), "output.weight": (6, 100)})
    tower = 16 * (14 * 14 * 3 * 8 + 8 * 8 + 8 * 20 + 2 * 16 * 8 * 2) + 4 * (32 * 6)
    assert tile_price(model, PROJECTOR, TOWER) == pytest.approx(tower / 36)


def test_experts_count_as_often_as_they_run() -> None:
    dense = {"blk.0.attn_q.weight": (6, 6)}
    experts = dense | {"blk.0.ffn_up_exps.weight": (6, 10, 8)}
    mixed = header("moe", experts, moe__expert_count=8, moe__expert_used_count=2)
    ratio = tile_price(header("llama", dense), PROJECTOR, TOWER) / tile_price(mixed, PROJECTOR, TOWER)
    assert ratio == pytest.approx((36 + 6 * 10 * 2) / 36)


def test_files_that_do_not_say_have_no_price() -> None:
    assert tile_price(header("llama", {}), PROJECTOR, TOWER) == 0
    assert tile_price(header("llama", {"blk.0.x.weight": (2, 2)}), PROJECTOR, Tower(1, False, 1, 0, 0)) == 0


def test_weights_of_all_parts_count(engine: Engine, tmp_path: Path) -> None:
    """Of a model whose first part holds metadata alone."""
    built = zoo.build("llava15", tmp_path)
    first, *_ = zoo.split(built.model, tmp_path, small_first_shard=True)
    whole, parts = load(engine, built), engine.load(first, built.mmproj)
    assert parts.info.tile_price == whole.info.tile_price > 0
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        parts.embed("a")
    for vlm in (whole, parts):
        vlm.close()
