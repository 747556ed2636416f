"""Qwen3-VL (2511.21631): patches of 16 pixels, position embeddings resized to the picture, interleaved M-RoPE, and
deepstack: outputs of inner blocks of the tower are added after the decoder's first layers.
"""

from __future__ import annotations

from tests.zoo.qwen import EPS, VOCAB, VisionConfig, make_cases, make_row
from tests.zoo.row import Drawing
from tests.zoo.text import TextConfig

__all__ = ["ROW"]

CASES = make_cases(
    (Drawing(300, 200, 7, 31), tuple(range(1, 70, 6))),
    (Drawing(150, 500, 20, 32), (0, 4, 6, 17, 34, 79)),
    (Drawing(700, 30, 8, 33), (3, 8, 40, 77)),
    (Drawing(40, 44, 1, 34), (4, 5, 17, 18, 38)),
)


ROW = make_row(
    "qwen3vl",
    TextConfig(
        arch="qwen3vl",
        hidden=48,
        layers=3,
        heads=4,
        kv_heads=2,
        ffn=128,
        vocab=VOCAB,
        rope_theta=5e6,
        eps=EPS,
        mrope=(6, 5, 5),
        head_size=32,
        qk_norm=True,
        deepstack=2,
    ),
    VisionConfig(
        projector="qwen3vl_merger",
        mlp={"mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"},
        merger=("merger.norm", "merger.linear_fc1", "merger.linear_fc2"),
        grids={(300, 200): (7, 10), (150, 500): (16, 5), (700, 30): (2, 39), (40, 44): (9, 8)},
        patch=16,
        values={"clip.vision.spatial_merge_size": 2},
        hf={"num_position_embeddings": 144, "deepstack_visual_indexes": [1, 2]},
        gelu=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        split=False,
        least=64,
        side=12,
        deepstack=(1, 2),
    ),
    "Qwen3VL",
    31,
    CASES,
)
