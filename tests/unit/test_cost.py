"""FLOPs against a count of every product."""

from __future__ import annotations

import gguf
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from localvlm.catalog import pair_named
from localvlm.cost import LlmShape


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 5))
def test_flops_are_those_of_every_product_of_a_pass(prompts, fed, outputs):
    shape = LlmShape(blocks=tuple(range(70, 70 + len(prompts))), head=30, width=5)
    want = outputs * 2 * 30
    for layer, rows in enumerate(prompts):
        for row in range(rows + fed):
            want += 2 * (70 + layer)
            want += 2 * (2 * 5 * (row + 1))  # scores and values: a multiplication and an addition for each cell
    assert shape.flops(prompts, fed, outputs) == want
    same = [prompts[0]] * len(prompts)
    assert shape.flops(prompts[0], fed, outputs) == shape.flops(same, fed, outputs)


def test_shapes_of_the_demo_pair():
    pair = pair_named("demo")
    assert pair.guide is not None
    assert pair.model is not None
    small, large = LlmShape.of(pair.guide.model), LlmShape.of(pair.model.model)
    assert 0 < sum(small.blocks) < sum(large.blocks)
    assert large.n_layer >= 12
    assert all(large.blocks)


def test_a_row_meets_the_experts_that_are_used(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "qwen3moe")
    for key, value in (("block_count", 2), ("embedding_length", 32), ("attention.head_count", 4),
                       ("attention.key_length", 16), ("expert_count", 8), ("expert_used_count", 2)):  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 32), np.float32))
    for i in range(2):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.zeros((64, 32), np.float32))
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.zeros(32, np.float32))
        writer.add_tensor(f"blk.{i}.ffn_up_exps.weight", np.zeros((8, 48, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = LlmShape.of(tmp_path / "moe.gguf")
    assert shape == LlmShape((64 * 32 + 2 * 48 * 32,) * 2, 100 * 32, 4 * 16)
