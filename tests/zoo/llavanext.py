"""LLaVA-NeXT (LLaVA-1.6): the tower, projector and decoder of LLaVA-1.5, pictures in tiles, and a row end after each
row of their joint raster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tests.zoo.llava15 import TOKENIZER, VOCAB, LlavaReference, VisionConfig, llava_cases, weights, write_mmproj
from tests.zoo.mmproj import VitSizes
from tests.zoo.row import RGB, Drawing, Grid, Row, Spelling
from tests.zoo.text import TextConfig
from tests.zoo.weights import Float32

__all__ = ["ROW", "LlavaNextReference"]

IMAGE = 56
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
"""(height, width), those of LLaVA-1.6 in order."""
RASTERS = {(90, 230): (10, 4), (50, 37): (4, 6), (133, 140): (8, 8), (400, 61): (2, 12)}
"""(width, height) of a picture -> rows and columns of the tiles' raster without padding, from transformers."""


def _spell(width: int, height: int) -> Spelling:
    side = IMAGE // 14
    return Grid(side, side), Grid(*RASTERS[width, height], ends="after")


class LlavaNextReference(LlavaReference):
    """The model in transformers."""

    CLASSES = "LlavaNext"

    def __init__(
        self,
        text: TextConfig,
        vision: VitSizes,
        tensors: Mapping[str, Float32],
        pinpoints: Sequence[tuple[int, int]] = PINPOINTS,
        **settings: Any,
    ) -> None:
        self._pinpoints = [list(size) for size in pinpoints]
        super().__init__(text, vision, tensors, image_grid_pinpoints=self._pinpoints, **settings)

    def _processor(self, **settings: Any) -> Any:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(**self._size, image_grid_pinpoints=self._pinpoints, **settings)

    def _packed(self, tiles: Any, cut: Any, end: Any) -> Float32:
        """(tiles, N, width) -> (n, width) as transformers puts rows of tiles together."""
        return np.asarray(
            self._model.model.pack_image_features([tiles], cut["image_sizes"], "default", end)[0][0].numpy()
        )

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        cut = self._cut(image)
        rows, attention = self._attended(cut)
        tower = self._torch.from_numpy(self._saliency(attention).transpose(1, 2, 0).copy())
        return rows.numpy(), self._packed(tower, cut, None).T

    def encode_stock(self, image: RGB) -> Float32:
        cut = self._cut(image)
        with self._torch.no_grad():
            return self._packed(self._stock_tiles(cut["pixel_values"][0]), cut, self._model.model.image_newline)


CASES = llava_cases(
    "tall",
    (
        (Drawing(90, 230, 1, 21), (0, 7, 15, 16, 17, 24, 25, 34, 43, 55)),
        (Drawing(50, 37, 7, 22), (2, 3, 20, 21, 34)),
        (Drawing(133, 140, 9, 23), tuple(range(5, 80, 7))),
        (Drawing(400, 61, 10, 24), (4, 16, 27, 28, 39)),
    ),
    after_long=23,
)

TEXT = TextConfig(
    "llama", hidden=128, layers=3, heads=4, kv_heads=2, ffn=192, vocab=VOCAB, rope_theta=1e4, eps=1e-5, context=2048
)
VISION = VisionConfig(hidden=64, layers=5, heads=2, ffn=128, image=IMAGE, pinpoints=PINPOINTS)
ROW = Row(
    name="llavanext",
    text=TEXT,
    tokenizer=TOKENIZER,
    spell=_spell,
    tower_layers=VISION.layers - 1,
    repairs=("llava-cls-order",),
    cases=CASES,
    seed=17,
    fill=partial(weights, TEXT, VISION),
    write_mmproj=partial(write_mmproj, TEXT, VISION),
    reference=partial(LlavaNextReference, TEXT, VISION),
)
