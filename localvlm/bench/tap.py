"""What the attention tap costs: the guide's LLM time with the tap on, against the same with it off, in alternation."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localvlm.bench.shapes import GUIDE_028B, VlmShape, write_vlm
from localvlm.engine.api import ImagePart, LoadOptions, TextPart, Vlm
from localvlm.engine.client import Engine

__all__ = ["TapCost", "measure"]

PROMPT_TOKENS = 53
_PREFIX = 3
"""Tokens of the space that SentencePiece puts before a text; this vocabulary spells everything in bytes."""
ANSWER_TOKENS = 9
"""Of which all but the last are fed back, and so tapped."""


@dataclass(frozen=True)
class TapCost:
    """Milliseconds of prefill plus decode per repetition, tap off and on, pair by pair."""

    shape: str
    n_params: int
    image_tokens: int
    off: tuple[float, ...]
    on: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over pairs of on / off."""
        return statistics.median(b / a for a, b in zip(self.off, self.on, strict=True))


def _llm_ms(vlm: Vlm, parts: list[TextPart | ImagePart], tap: bool) -> float:
    prefilled = vlm.prefill(parts, tap=tap)
    started = time.perf_counter()
    vlm.feed(np.arange(300, 300 + ANSWER_TOKENS - 1, dtype=np.int32))
    return prefilled.ms + (time.perf_counter() - started) * 1e3


def measure(pairs: int = 9, threads: int = 0, shape: VlmShape = GUIDE_028B, folder: Path | None = None) -> TapCost:
    """Alternates tap off and on ``pairs`` times over one prompt of 576 image tokens and 53 text tokens."""
    with tempfile.TemporaryDirectory() as name, Engine() as engine:
        model, mmproj = write_vlm(folder or Path(name), shape)
        vlm = engine.load(model, mmproj, LoadOptions(threads=threads))
        picture = np.random.default_rng(0).integers(0, 256, (shape.tower.image, shape.tower.image, 3), dtype=np.uint8)
        image = vlm.encode(picture)
        text = "x" * (PROMPT_TOKENS - _PREFIX)
        parts: list[TextPart | ImagePart] = [ImagePart(image), TextPart(text)]
        for tap in (True, False):  # warm up; the first tapped run also checks the tap against the model
            _llm_ms(vlm, parts, tap)
        off: list[float] = []
        on: list[float] = []
        for i in range(pairs):
            for tap in (False, True) if i % 2 == 0 else (True, False):
                (on if tap else off).append(_llm_ms(vlm, parts, tap))
        return TapCost(shape.name, vlm.info.n_params, image.layout.n_tokens, tuple(off), tuple(on))
