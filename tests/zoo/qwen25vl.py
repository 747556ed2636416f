"""Qwen2.5-VL (2502.13923): RMSNorm, gated blocks that attend within windows, but for every second."""

from __future__ import annotations

from tests.zoo.qwen import EPS, TOKENIZER, VOCAB, VisionConfig, make_cases, make_row
from tests.zoo.row import Drawing
from tests.zoo.text import TextConfig

__all__ = ["CASES", "GRIDS", "LARGE", "ROW", "TOKENIZER"]

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
    values={"clip.use_silu": True, "clip.vision.n_wa_pattern": 2},
    hf={"window_size": 112, "fullatt_block_indexes": [1, 3]},
    norm_bias=False,
    window=112,
)
ROW = make_row("qwen25vl", decoder(128, 3, 4, 2, 192), VISION, "Qwen2_5_VL", 25, CASES)
LARGE = make_row("qwen25vl-large", decoder(192, 4, 6, 3, 320), VISION, "Qwen2_5_VL", 26, CASES)
