"""Qwen2-VL (2409.12191): LayerNorm, quick GELU, every block attends to the whole picture."""

from __future__ import annotations

from tests.zoo.qwen import VisionConfig, make_row
from tests.zoo.qwen25vl import CASES, GRIDS, decoder

__all__ = ["ROW"]


ROW = make_row(
    "qwen2vl",
    decoder(96, 2, 3, 1, 160),
    VisionConfig(
        projector="qwen2vl_merger",
        mlp={"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
        merger=("merger.ln_q", "merger.mlp.0", "merger.mlp.2"),
        grids=GRIDS,
        ffn=128,
        hf={"embed_dim": 64, "mlp_ratio": 2, "hidden_size": 96},
    ),
    "Qwen2VL",
    20,
    CASES,
)
