"""Qwen2-VL (2409.12191): LayerNorm, quick GELU, every block attends to the whole picture."""

from __future__ import annotations

from typing import Any

from tests.zoo.qwen import VisionConfig, make_row, token_ids
from tests.zoo.qwen25vl import CASES, GRIDS, decoder
from tests.zoo.text import TextConfig

__all__ = ["ROW"]


def build(text: TextConfig, vision: VisionConfig) -> Any:
    """``Qwen2VLForConditionalGeneration``."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

    v = vision
    tower = Qwen2VLVisionConfig(
        depth=v.layers,
        embed_dim=v.hidden,
        mlp_ratio=v.ffn // v.hidden,
        num_heads=v.heads,
        hidden_size=text.hidden,
        patch_size=v.patch,
    )
    config = Qwen2VLConfig(
        vision_config=tower,
        text_config=Qwen2VLTextConfig(**text.hf()),
        attn_implementation="eager",
        **token_ids(),
    )
    return Qwen2VLForConditionalGeneration(config)


ROW = make_row(
    "qwen2vl",
    decoder(96, 2, 3, 1, 160),
    VisionConfig(
        projector="qwen2vl_merger",
        mlp={"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
        merger=("merger.ln_q", "merger.mlp.0", "merger.mlp.2"),
        grids=GRIDS,
        ffn=128,
    ),
    build,
    20,
    CASES,
)
