"""What a question may set, and what an answer tells: plain data, without a model or an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from localvlm.early_exit import Score
from localvlm.engine.api import Attention, Completion, Encoded, ImageLayout, Prefilled
from localvlm.errors import UsageError
from localvlm.pair import Pair, VlmFiles
from localvlm.pruning import Keep, Tokens, preset_named

__all__ = [
    "GUIDE_MAX_TOKENS",
    "STAGES",
    "Answer",
    "AskOptions",
    "AttentionMap",
    "Look",
    "Pair",
    "TileCounts",
    "TokenCounts",
    "VlmFiles",
]

Float32 = NDArray[np.float32]

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
GUIDE_MAX_TOKENS = 64
"""Longest answer of the guide; later tokens say little about where to look. One cut off here is never final."""


@dataclass(frozen=True)
class AskOptions:
    """What one question may set. ``keep`` None keeps all tokens; ``exit_at`` is the score from which the guide's answer
    is final (0: always), None: never. ``draft``: whether the guide's answer is a draft of the model's; None: where the
    method is led by the guide. ``layer``: of the model, before which the tokens not kept are dropped; they never enter
    it if 0. ``preset``: names a setting of the paper (``localvlm.pruning.PRESETS``), which says ``keep``, and ``layer``
    by the model's depth. ``tile_price``: encoding one of the model's tiles, in tokens of its prefill that take as long
    (:mod:`localvlm.pruning.joint`); None: as its shapes tell, 0: of no account. ``guide_keep``: share, or
    number, of each picture's image tokens that the guide is shown, chosen blind to the question; None: all. ``schema``:
    a JSON schema, as JSON, that guide and model answer by; "": none.

    Raises:
        UsageError: there is no such preset, or ``keep`` or ``layer`` were given beside it.
    """

    method: str = "sgl+"
    keep: Keep = 0.35
    max_tokens: int = 256
    temp: float = 0.0
    seed: int = 0
    system: str | None = None
    exit_at: float | None = None
    guide_max_tokens: int = GUIDE_MAX_TOKENS
    draft: bool | None = None
    layer: int = 0
    preset: str | None = None
    tile_price: float | None = None
    guide_keep: float | Tokens | None = None
    schema: str = ""

    def __post_init__(self) -> None:
        if self.preset is None:
            return
        keep = preset_named(self.preset).keep
        if self.layer or self.keep not in (AskOptions.keep, keep):
            raise UsageError(f"preset '{self.preset}' says keep and layer, and one of these was given too", "give one")
        object.__setattr__(self, "keep", keep)

    def layer_in(self, n_layer: int) -> int:
        """The layer in a model that has ``n_layer``."""
        return self.layer if self.preset is None else preset_named(self.preset).layer_in(n_layer)


@dataclass(frozen=True)
class TokenCounts:
    """``image``: image tokens of the grid of the VLM that answered; ``kept``: those the model saw, None if the guide
    answered; ``prompt``: all cells prefilled; ``drafted``: tokens of the guide's answer, its end among them, that were
    the model's draft; ``accepted``: how many of them, from the first on, its answer has. ``mean_kept``: image tokens in
    a layer of the model, averaged over its layers; papers on pruning within a model give this one, others ``kept``.
    ``guide``: image tokens that the guide saw of its own; None: it did not look.
    """

    image: int
    kept: int | None
    prompt: int
    generated: int
    drafted: int = 0
    accepted: int = 0
    mean_kept: float | None = None
    guide: int | None = None


@dataclass(frozen=True)
class TileCounts:
    """``total``: passes of the vision tower that the pictures take in the VLM that answered; ``encoded``: those made,
    since no other tile holds a kept token; ``shared``: those of them in which its projector alone ran, since the other
    VLM has the same tower.
    """

    total: int
    encoded: int
    shared: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about.

    Attributes:
        answer_ids: generated tokens, the end token not included.
        kept_indices: image tokens the model saw, counted jointly over all pictures.
        answered_by: "guide" or "model".
        ms: milliseconds per name of STAGES; "first_token" and "total" are counted from the call, loading included;
            "guide_prefill" includes the pass that checks the guide's answer.
        keep: the budget asked for: a share (1.0 = all), "auto", or "64 tokens".
        layer: of the model, before which the other tokens were dropped, of methods that choose them before it runs.
        steps: (layer, image tokens from it on) in the model, the first at layer 0; empty if the guide answered.
        score: of the guide's answer, where it could be final; it was if this reached ``threshold``.
        layouts: where the image tokens of the VLM that answered lie, picture by picture.
        saliency: (N,) scores of these tokens, joint over all pictures; None if no guide led the choice.
        earlier: image tokens among ``kept_indices`` that the model had of questions before; these stay in a session.
        ran: cells that the guide and the model prefilled for this question; in a session others were there already.
    """

    text: str
    answer_ids: tuple[int, ...]
    kept_indices: tuple[int, ...]
    answered_by: str
    tokens: TokenCounts
    ms: dict[str, float]
    method: str
    keep: float | str
    pair: str | None
    finish: str = "stop"
    layer: int = 0
    steps: tuple[tuple[int, int], ...] = ()
    tiles: TileCounts = TileCounts(0, 0)
    guide_text: str | None = None
    score: Score | None = None
    threshold: float | None = None
    layouts: tuple[ImageLayout, ...] = field(default=(), repr=False, compare=False)
    saliency: Float32 | None = field(default=None, repr=False, compare=False)
    earlier: int = field(default=0, compare=False)
    ran: tuple[int, int] = field(default=(0, 0), compare=False)


@dataclass(frozen=True)
class Look:
    """What the guide saw and said.

    Attributes:
        attention: over its own image tokens, joint over all pictures; those it was not shown have what the one that
            stands for them has (:func:`localvlm.guidance.stand_ins`).
        shown: image tokens that it was shown of each picture.
        score: how far its answer is to be trusted, if that was asked for.
        layouts: where these lie, picture by picture.
    """

    attention: Attention
    encoded: tuple[Encoded, ...]
    prompt: Prefilled
    answer: Completion
    shown: tuple[int, ...]
    score: Score | None = None

    @property
    def layouts(self) -> tuple[ImageLayout, ...]:
        return tuple(e.layout for e in self.encoded)


@dataclass(frozen=True)
class AttentionMap:
    """A VLM's attention on one picture: the arrays of ``localvlm attention --save``, by name."""

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
