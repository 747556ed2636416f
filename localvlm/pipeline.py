"""From pictures and a question to an answer: the guide looks, tokens are chosen, the model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Engine, LoadOptions
from localvlm.images import Image

__all__ = ["Answer", "AskOptions", "AttentionMap", "Pair", "Pipeline", "TokenCounts", "VlmFiles"]

STAGES = (
    "load",
    "guide_encode",
    "guide_prefill",
    "guide_decode",
    "encode",
    "prefill",
    "decode",
    "first_token",
    "total",
)


@dataclass(frozen=True)
class VlmFiles:
    """The two GGUF files of one VLM."""

    model: Path
    mmproj: Path


@dataclass(frozen=True)
class Pair:
    """A guide and a model; either may be missing (``attention`` needs no model, guide-free methods no guide)."""

    name: str | None
    guide: VlmFiles | None
    model: VlmFiles | None


@dataclass(frozen=True)
class AskOptions:
    """What one question may set. ``keep`` None keeps all tokens."""

    method: str = "sgl+"
    keep: float | None = 0.35
    max_tokens: int = 256
    temp: float = 0.0
    seed: int = 0
    system: str | None = None


@dataclass(frozen=True)
class TokenCounts:
    """``image``: image tokens of the model's grid; ``kept``: those it saw; ``prompt``: all cells prefilled."""

    image: int
    kept: int
    prompt: int
    generated: int


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about. ``ms`` has one entry per name in STAGES, in milliseconds."""

    text: str
    answer_ids: tuple[int, ...]
    kept_indices: tuple[int, ...]
    answered_by: str
    tokens: TokenCounts
    ms: dict[str, float]
    method: str
    keep: float
    pair: str | None
    finish: str = "stop"
    guide_text: str | None = None


@dataclass(frozen=True)
class AttentionMap:
    """The guide's attention on one picture: the arrays of ``localvlm attention --save``."""

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)


class Pipeline:
    """A pair, loaded as far as it is needed."""

    def __init__(
        self, pair: Pair, engine: Engine, *, guide: LoadOptions = LoadOptions(), model: LoadOptions = LoadOptions()
    ) -> None:
        raise NotImplementedError

    @classmethod
    def open(cls, pair: Pair, options: LoadOptions = LoadOptions(), engine: Engine | None = None) -> Pipeline:
        raise NotImplementedError

    def ask(
        self,
        images: Sequence[Image],
        question: str,
        options: AskOptions = AskOptions(),
        on_text: Callable[[str], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Answer:
        raise NotImplementedError

    def attention(self, images: Sequence[Image], question: str, max_tokens: int = 64) -> AttentionMap:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
