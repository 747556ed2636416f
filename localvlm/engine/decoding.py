"""Decoding: tokens after the rows of a cache, picked, fed, checked against a draft or scored."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Completion, SamplingOptions
from localvlm.engine.cache import Cache
from localvlm.engine.draft_memory import DraftMemory
from localvlm.engine.drafts import Follower, agreed
from localvlm.engine.grammar import Grammar
from localvlm.engine.llama import MAX_OUTPUTS, Model
from localvlm.engine.sampling import Sampler
from localvlm.errors import Interrupted, UsageError

__all__ = ["Decoder"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Decoder:
    """Continues what the cache of one VLM holds; along drafts, by what ``memory`` holds of them."""

    def __init__(self, model: Model, cache: Cache, memory: DraftMemory) -> None:
        self._model, self._cache, self._memory = model, cache, memory

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions,
        on_text: Callable[[str], None] | None,
        draft: Int32 | None,
    ) -> Completion:
        """See :meth:`localvlm.engine.api.Vlm.generate`."""
        started = time.perf_counter()
        cache, vocabulary = self._cache, self._model.vocabulary
        cache.settle()
        logits = cache.logits
        sampler = Sampler(sampling, Grammar(vocabulary, sampling.schema) if sampling.schema else None)
        likely = self._usable(draft, max_tokens, sampling)
        taken, n_ctx = cache.taken, cache.context.n_ctx
        deviations = self._memory.at(cache.cuts)
        follower = Follower(
            cache.feed, cache.forget, likely[: max_tokens - 1], cache.cells, n_ctx, deviations, sampler.lead
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ids: list[int] = []
        logprobs: list[float] = []
        pieces: list[str] = []
        finish, first_ms, fed = "length", 0.0, 0
        try:
            while len(ids) < max_tokens:
                token, logprob = sampler.pick(logits)
                logprobs.append(logprob)
                if vocabulary.ends(token) and not sampling.past_end:
                    finish = "stop"
                    break
                ids.append(token)
                first_ms = first_ms or (time.perf_counter() - started) * 1e3
                _emit(decoder.decode(vocabulary.piece(token)), pieces, on_text)
                if len(ids) == max_tokens or taken + fed >= n_ctx:
                    break
                logits = cache.last = follower.after(token)
                fed += 1
        except Interrupted:
            finish = "cancelled"
        follower.finish()
        cache.mend = follower.leave
        _emit(decoder.decode(b"", True), pieces, on_text)
        ms = (time.perf_counter() - started) * 1e3
        text = "".join(pieces)
        return Completion(
            text,
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            finish,
            ms,
            first_ms or ms,
            fed,
            drafted=len(likely),
            accepted=agreed(ids, likely),
        )

    def feed(self, ids: Int32) -> None:
        """See :meth:`localvlm.engine.api.Vlm.feed`."""
        self._cache.settle()
        for token in ids:
            self._cache.last = self._cache.feed([int(token)])[0]

    def score(self, ids: Int32) -> Float32:
        """See :meth:`localvlm.engine.api.Vlm.score`."""
        cache = self._cache
        cache.settle()
        out = [cache.logits[None]]
        tapping, cache.tapping = cache.tapping, False
        fed = 0
        try:
            for start in range(0, len(ids) - 1, MAX_OUTPUTS):
                chunk = np.asarray(ids[start : min(start + MAX_OUTPUTS, len(ids) - 1)], np.int32)
                out.append(cache.feed(chunk, generated=False))
                fed += len(chunk)
        finally:
            cache.forget(fed)
            cache.tapping = tapping
        return np.concatenate(out)[: len(ids)]

    def _usable(self, draft: Int32 | None, max_tokens: int, sampling: SamplingOptions) -> Sequence[int]:
        """The part of a draft that this answer can take over."""
        if draft is None or sampling.temp > 0 or self._cache.tapping or not self._model.forgets:
            return []
        if len(draft) and (min(draft) < 0 or max(draft) >= self._model.vocabulary.size):
            raise UsageError(f"the draft's tokens must be within 0..{self._model.vocabulary.size - 1}")
        return [int(token) for token in draft[:max_tokens]]


def _emit(piece: str, pieces: list[str], on_text: Callable[[str], None] | None) -> None:
    if piece:
        pieces.append(piece)
        if on_text:
            on_text(piece)
