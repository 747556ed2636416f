"""Prompts that wait between layers: what is there may be looked at, dropped or replaced before they go on.

Each stretch of layers over which no row leaves runs in a context of its own (:mod:`localvlm.engine.staged`), once for
each pause within it; later tokens go through it at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, Part, Paused, Prefilled, Reuse
from localvlm.engine.cache import Cache
from localvlm.engine.llama import Model
from localvlm.engine.native import ROW_PROMPT
from localvlm.engine.prompts import Prompts, check_encoded, prefilled
from localvlm.engine.rows import Placed, PromptRows
from localvlm.engine.staged import Segment
from localvlm.engine.token_table import TokenTable
from localvlm.engine.tower import Picture
from localvlm.errors import UsageError

__all__ = ["StagedPrompts"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class _Waiting:
    """A prompt before the layer ``paused.layer``.

    Attributes:
        rows: that are there.
        hidden: (rows.n, n_embd) what they are; None before layer 0, where those that replace image tokens are alone.
        again: the context opened last has run just these rows.
    """

    rows: PromptRows
    paused: Paused
    hidden: Float32 | None = None
    again: bool = False


class StagedPrompts(Prompts):
    """Fills the cache of one VLM, layer by layer where that is asked for; see :class:`Prompts`.

    Args:
        embed: gives (n, width) input embeddings of token ids.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        picture: Callable[[Encoded], Picture],
        causal: bool,
        table: TokenTable | None,
        compact: bool,
        embed: Callable[[Int32], Float32],
    ) -> None:
        super().__init__(model, cache, picture, causal, table, compact)
        self._embed = embed
        self._waiting: _Waiting | None = None

    def prefill(self, parts: Sequence[Part], tap: bool, reuse: Reuse, since: int, layer: int = 0) -> Prefilled:
        """See :meth:`localvlm.engine.api.Vlm.prefill`."""
        self._waiting = None
        if not layer:
            return super().prefill(parts, tap, reuse, since)
        started = time.perf_counter()
        laid, first = self._tokenized(parts, since)
        kept = self._rows(laid, first).tokens
        self._run_to(self._started([_whole(part) for part in laid], first), layer)
        return replace(self._finish(kept, None, tap), ms=(time.perf_counter() - started) * 1e3)

    def pause(self, parts: Sequence[Part], layer: int, attend: Sequence[int] | None, hidden: bool) -> Paused:
        """See :meth:`localvlm.engine.api.Vlm.pause`."""
        self._waiting = None
        start = self._started(*self._tokenized(parts, 0))
        return self._run_to(start, layer, start.paused.asked(attend) if layer else _NONE, hidden)

    def resume(
        self, keep: Int32 | None, rows: Float32 | None, layer: int, attend: Sequence[int] | None, hidden: bool
    ) -> Paused:
        """See :meth:`localvlm.engine.api.Vlm.resume`."""
        here = self._going_on(keep, rows)
        if layer <= here.paused.layer:
            raise UsageError(f"the prompt waits before layer {here.paused.layer} and cannot go on to layer {layer}")
        return self._run_to(here, layer, here.paused.asked(attend), hidden)

    def finish(self, keep: Int32 | None, rows: Float32 | None) -> Prefilled:
        """See :meth:`localvlm.engine.api.Vlm.finish`."""
        return self._finish(keep, rows, tap=False)

    # what waits

    def _started(self, laid: Sequence[Sequence[int] | Placed], first: int) -> _Waiting:
        """A prompt before layer 0."""
        if any(isinstance(part, Placed) and part.again is not None for part in laid):
            raise UsageError("more tokens of a picture cannot go into a prompt that is pruned at a layer")
        rows = self._rows(laid, first)
        self._check_room(rows)
        behind = int(np.flatnonzero(rows.local >= 0).max(initial=-1)) + 1
        return _Waiting(rows, Paused(0, rows.all_ids, rows.tokens, rows.ids[behind:]))

    def _going_on(self, keep: Int32 | None, given: Float32 | None) -> _Waiting:
        """What waits, with the image tokens ``keep`` alone and with ``given`` hidden rows in the places of theirs."""
        if (here := self._waiting) is None:
            raise UsageError("no prompt is paused", "call pause first")
        kept, rows, hidden = here.paused.kept(keep), here.rows, here.hidden
        width = self._model.n_embd
        if given is not None and given.shape != (len(kept), width):
            raise UsageError(f"{len(kept)} rows, {width} wide, are wanted, and {given.shape} were given")
        stays = rows.staying(kept)
        if not stays.any():
            raise UsageError("the prompt is empty")
        if not stays.all():
            rows = self._numbered(rows.only(stays))
            hidden = None if hidden is None else hidden[stays]
        if given is not None:
            hidden = np.zeros((rows.n, width), np.float32) if hidden is None else hidden.copy()
            hidden[rows.image >= 0] = given
        return _Waiting(rows, replace(here.paused, image=kept), hidden, here.again and bool(stays.all()))

    def _run_to(self, here: _Waiting, layer: int, asked: Int32 = _NONE, hidden: bool = False) -> Paused:
        """Runs rows up to a layer, where they wait. ``asked``: those of ``after`` whose attention is wanted."""
        rows, paused, cache = here.rows, here.paused, self._cache
        attention = np.zeros((self._model.n_head, len(paused.image)), np.float32) if len(asked) else None
        tapping = attention is not None and attention.size > 0
        classes = np.zeros(rows.n, np.uint8)
        classes[rows.n - len(paused.after) + asked] = ROW_PROMPT * tapping
        with self._emptied_on_failure():
            if not paused.layer:
                cache.keep(0)
                cache.staged = True
            if layer > paused.layer:
                again = paused.layer if here.again else None
                segment = cache.opened(paused.layer, layer, rows.n) if again is None else cache.extended(layer)
                with self._recording(segment, rows if tapping else None, reductions=1):
                    found = self._through(segment, here, classes, tapping, again)
                here = replace(here, hidden=found, again=True)
                if tapping:
                    attention = segment.tap.read(0, 0)[layer - 1][:, paused.image] / np.float32(len(asked))
            shown, text = self._shown(here, layer) if hidden else (None, None)
        paused = Paused(layer, paused.token_ids, paused.image, paused.after, attention, shown, text)
        self._waiting = replace(here, paused=paused)
        return paused

    def _finish(self, keep: Int32 | None, given: Float32 | None, tap: bool) -> Prefilled:
        started = time.perf_counter()
        here, cache = self._going_on(keep, given), self._cache
        self._waiting = None
        with self._emptied_on_failure():
            main = cache.opened(here.paused.layer, self._model.n_layer, here.rows.n)
            cache.tapping = tap
            with self._recording(main, here.rows if tap else None):
                self._through(main, here, here.rows.classes * tap, tap)
            cache.filled(here.rows)
        return prefilled(here.rows, started, here.rows.n)

    def _through(
        self, segment: Segment, here: _Waiting, classes: NDArray[np.uint8], tapping: bool, since: int | None = None
    ) -> Float32 | None:
        """(rows.n, n_embd) what the layers of a segment give, None of the last ones; ``since`` as in its ``run``."""
        rows, out = here.rows, []
        given, entering = (None, here.hidden) if here.paused.layer else (here.hidden, None)
        for run in self._batches(rows):
            batch = self._batch(rows, run, classes, given)
            hidden = None if entering is None else entering[run.start : run.stop]
            if (found := segment.run(batch, hidden, tapping, since)) is not None:
                out.append(found)
            else:
                self._cache.ran(rows.keys[run.start : run.stop])
        segment.filled(rows)
        return np.concatenate(out) if out else None

    def _shown(self, here: _Waiting, layer: int) -> tuple[Float32, Float32]:
        """Hidden rows of the image tokens and of the text after them."""
        rows, after, width = here.rows, here.paused.after, self._model.n_embd
        if layer:
            assert here.hidden is not None
            return here.hidden[rows.image >= 0], here.hidden[rows.n - len(after) :]
        projected = [np.zeros((0, width), np.float32)]
        for run in rows.runs:
            if run.picture is not None:
                span = slice(run.start, run.stop)
                projected.append(run.picture.at(rows.local[span][rows.image[span] >= 0])[:, :width])
        return np.concatenate(projected), self._embed(after)[:, :width]

    @contextlib.contextmanager
    def _emptied_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._waiting = None
            self._cache.keep(0)
            raise


def _whole(part: Sequence[int] | Placed) -> Sequence[int] | Placed:
    """With nothing pruned."""
    if not isinstance(part, Placed):
        return part
    check_encoded(part.picture, None)
    return replace(part, keep=None)
