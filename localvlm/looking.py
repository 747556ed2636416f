"""A look at pictures: what a VLM is shown, where it attends, what it says, and how far that is to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import Look
from localvlm.clock import Clock
from localvlm.early_exit import CONSISTENCY_KEEP, Score, confidence, consistency
from localvlm.engine.api import Message, Reuse, SamplingOptions, TextPart, Vlm
from localvlm.errors import Interrupted
from localvlm.guidance import AGGREGATIONS, carried
from localvlm.images import Image
from localvlm.pruning import Method, Tokens
from localvlm.selection import select
from localvlm.speaker import Shown, Speaker, parts_of

__all__ = ["look_at"]


def look_at(
    speaker: Speaker,
    images: Sequence[Image],
    messages: Sequence[Message],
    max_tokens: int,
    clock: Clock,
    *,
    keep: float | Tokens | None = None,
    tower: bool = False,
    check: Method | None = None,
    reuse: Reuse = "batches",
    last_alone: bool = False,
    schema: str = "",
) -> Look:
    """Asks about pictures, ``keep`` of whose tokens are shown, and reads where the answer comes from.

    ``tower``: with the vision tower's attention. ``check``: the method that prunes the picture for the answer's score;
    None: it gets none. ``reuse`` as in :meth:`Vlm.prefill`. ``last_alone``: attention is that of the last message, not
    of all text after the last picture. ``schema``: what the answer follows, see :class:`SamplingOptions`.

    Raises:
        Interrupted: the engine was cancelled.
    """
    vlm = speaker.vlm
    with clock("guide_encode"):
        encoded = speaker.encode(images, tower=tower)
    with clock("guide_prefill"):
        shown = speaker.shown(images, keep)
        parts = parts_of(vlm, messages, encoded, [s.tokens for s in shown])
        asked = [i for i, p in enumerate(parts) if isinstance(p, TextPart) and not p.special]
        prompt = vlm.prefill(parts, tap=True, reuse=reuse, since=asked[-1] if last_alone else 0)
    with clock("guide_decode"):
        answer = vlm.generate(max_tokens, SamplingOptions(schema=schema))
    if answer.finish == "cancelled":
        raise Interrupted()
    attention, seen = vlm.attention(), tuple(len(s.of) if s.tokens is None else len(s.tokens) for s in shown)
    if any(s.tokens is not None for s in shown):
        attention = carried(attention, *_joint(shown))
    look = Look(attention, encoded, prompt, answer, seen)
    if check is None:
        return look
    with clock("guide_prefill"):
        return replace(look, score=_score(vlm, messages, look, check))


def _joint(shown: Sequence[Shown]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Which token stands for each, counted over all pictures, and how much alike they are."""
    starts = np.cumsum([0, *(len(s.of) for s in shown)])
    of = [s.of + np.int32(start) for s, start in zip(shown, starts[:-1], strict=True)]
    return np.concatenate(of), np.concatenate([s.share for s in shown])


def _score(vlm: Vlm, messages: Sequence[Message], look: Look, method: Method) -> Score:
    """How sure it was, and whether it says the same from its own pruned image: one teacher-forced pass."""
    saliency = AGGREGATIONS[method.aggregation or "sum"](look.attention)
    kept = select(method, CONSISTENCY_KEEP, look.layouts, saliency)
    ids = look.answer.ids
    pruned = parts_of(vlm, messages, look.encoded, kept)
    logits = vlm.score(ids, pruned) if len(ids) else np.empty((0, 0), np.float32)
    return Score(confidence(look.answer.logprobs[: len(ids)]), consistency(logits, ids))
