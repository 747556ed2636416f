"""Granite Vision 3 (2502.09927): laid out as LLaVA-NeXT, with a SigLIP tower whose features are several layers'.

Its decoder here is Llama's. A tile is no whole number of patches, as the published 384 pixels are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.llava15 import NEWLINE, PROJECTOR, TOKENIZER, TOWER, VOCAB, llava_cases
from tests.zoo.llavanext import LlavaNextReference
from tests.zoo.row import RGB, Drawing, Grid, Row, Spelling
from tests.zoo.siglip import MEAN, STD, SiglipConfig, siglip_weights, write_siglip
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.weights import Float32, Weights

__all__ = ["ROW"]

IMAGE = 62
PINPOINTS = tuple((62 * r, 62 * c) for r in range(1, 4) for c in range(1, 4) if r * c <= 3)
"""(height, width), a smaller triangle than the published one."""
RASTERS = {(150, 61): (4, 10), (60, 66): (4, 4), (40, 130): (12, 4)}
"""As in ``llavanext``."""
LAYERS = (2, 4, 5)
"""Whose outputs are used, 0 being the embeddings."""
TEXT = TextConfig("llama", hidden=128, layers=2, heads=4, kv_heads=2, ffn=192, vocab=VOCAB, rope_theta=1e4, eps=1e-5)
VISION = SiglipConfig(hidden=64, layers=5, heads=2, ffn=128, image=IMAGE, patch=14)


def _weights(out: Weights) -> None:
    """The whole model by Hugging Face names."""
    siglip_weights(out, TOWER, VISION, VISION.side**2)
    for i in range(VISION.layers):
        out.tensors[f"{TOWER}.encoder.layers.{i}.mlp.fc2.weight"] *= 8  # so that the kind of GELU matters
    out.linear(f"{PROJECTOR}.linear_1", TEXT.hidden, VISION.hidden * len(LAYERS), bias=True)
    out.linear(f"{PROJECTOR}.linear_2", TEXT.hidden, TEXT.hidden, bias=True)
    out.normal(NEWLINE, TEXT.hidden, std=1.0)
    text_weights(out, TEXT)


def write_mmproj(path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file as LLaVA's converter does: without the tower's last norm, with CLIP's quick GELU."""
    projector = {f"mm.{i}.{k}": f"{PROJECTOR}.linear_{n}.{k}" for i, n in ((0, 1), (2, 2)) for k in ("weight", "bias")}
    write_siglip(
        path,
        "mlp",
        VISION,
        TOWER,
        {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name},
        width=TEXT.hidden,
        values={
            "clip.has_llava_projector": True,
            "clip.vision.image_grid_pinpoints": [n for size in PINPOINTS for n in size],
            "clip.vision.feature_layer": list(LAYERS),
        },
        names=projector | {NEWLINE: NEWLINE},
        gelu=False,
    )


class GraniteReference(LlavaNextReference):
    """The model in transformers."""

    def __init__(self, tensors: Mapping[str, Float32]) -> None:
        super().__init__(
            TEXT,
            VISION,
            tensors,
            PINPOINTS,
            vision_config={"model_type": "siglip_vision_model", **VISION.hf(), "vision_use_head": False},
            vision_feature_layer=list(LAYERS),
            vision_feature_select_strategy="full",
        )

    def _processor(self, **settings: Any) -> Any:
        return super()._processor(image_mean=list(MEAN), image_std=list(STD), **settings)

    def _saliency(self, attention: Float32) -> Float32:
        """(layers, tiles, patches) attention received, mean over heads and queries."""
        return np.asarray(attention.mean(axis=(2, 3)))

    def encode_stock(self, image: RGB) -> Float32:
        """The quick GELU in place of the tanh form."""
        from transformers.activations import ACT2FN

        blocks = [layer.mlp for layer in self._model.model.vision_tower.encoder.layers]
        right = [block.activation_fn for block in blocks]
        for block in blocks:
            block.activation_fn = ACT2FN["quick_gelu"]
        try:
            return self.encode(image)[0]
        finally:
            for block, function in zip(blocks, right, strict=True):
                block.activation_fn = function


def _spell(width: int, height: int) -> Spelling:
    return Grid(VISION.side, VISION.side), Grid(*RASTERS[width, height], ends="after")


CASES = llava_cases(
    "wide",
    (
        (Drawing(150, 61, 1, 31), (0, 7, 15, 16, 17, 24, 25, 34, 43, 55)),
        (Drawing(60, 66, 7, 32), (2, 3, 20, 21, 31)),
        (Drawing(40, 130, 9, 33), tuple(range(5, 60, 7))),
    ),
)
ROW = Row(
    name="granitevision",
    text=replace(TEXT, context=2048),
    tokenizer=TOKENIZER,
    spell=_spell,
    tower_layers=VISION.layers,
    repairs=("siglip-gelu",),
    cases=tuple(replace(case, fed=case.fed[: len(case.fed) // 2]) for case in CASES),
    seed=33,
    fill=_weights,
    write_mmproj=write_mmproj,
    reference=partial(GraniteReference),
)
