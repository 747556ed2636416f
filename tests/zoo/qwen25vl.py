"""Qwen2.5-VL (2502.13923): RMSNorm, gated blocks that attend within windows, but for every second."""

from __future__ import annotations

from typing import Any

from tests.zoo.qwen import EPS, TOKENIZER, VOCAB, VisionConfig, make_cases, make_row, token_ids
from tests.zoo.row import Drawing
from tests.zoo.text import TextConfig

__all__ = ["CASES", "GRIDS", "LARGE", "ROW", "TOKENIZER"]

PATTERN = 2
GRIDS = {
    (250, 97): (3, 9),
    (100, 210): (8, 4),
    (140, 70): (2, 5),
    (205, 150): (5, 7),
    (420, 13): (1, 12),
    (17, 300): (11, 1),
    (20, 30): (3, 2),
}
CASES = make_cases(
    (Drawing(250, 97, 7, 21), tuple(range(1, 27, 3))),
    (Drawing(100, 210, 10, 22), (0, 4, 6, 17, 31)),
    (Drawing(140, 70, 1, 23), (3, 8)),
    (Drawing(205, 150, 14, 24), (4, 5, 17, 18, 33)),
    (Drawing(420, 13, 6, 25), (0, 7, 11)),
    (Drawing(17, 300, 6, 26), (2, 3)),
    (Drawing(20, 30, 5, 27), (1, 5)),
)


def build(text: TextConfig, vision: VisionConfig) -> Any:
    """``Qwen2_5_VLForConditionalGeneration``."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    v = vision
    tower = Qwen2_5_VLVisionConfig(
        depth=v.layers,
        hidden_size=v.hidden,
        intermediate_size=v.ffn,
        num_heads=v.heads,
        out_hidden_size=text.hidden,
        patch_size=v.patch,
        window_size=v.window,
        fullatt_block_indexes=list(range(PATTERN - 1, v.layers, PATTERN)),
    )
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=Qwen2_5_VLTextConfig(**text.hf()),
        attn_implementation="eager",
        **token_ids(),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def decoder(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> TextConfig:
    """Qwen2 with M-RoPE."""
    return TextConfig(
        arch="qwen2vl",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocab=VOCAB,
        rope_theta=1e6,
        eps=EPS,
        qkv_bias=True,
        mrope=(4, 6, 6),
    )


VISION = VisionConfig(
    projector="qwen2.5vl_merger",
    mlp={"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    merger=("merger.ln_q", "merger.mlp.0", "merger.mlp.2"),
    grids=GRIDS,
    values={"clip.use_silu": True, "clip.vision.n_wa_pattern": PATTERN},
    norm_bias=False,
    window=112,
)
ROW = make_row("qwen25vl", decoder(128, 3, 4, 2, 192), VISION, build, 25, CASES)
LARGE = make_row("qwen25vl-large", decoder(192, 4, 6, 3, 320), VISION, build, 26, CASES)
