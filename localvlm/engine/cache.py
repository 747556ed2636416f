"""The KV cache of one VLM: what it holds, and batches that add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import Header
from localvlm.engine.llama import Context, Model, thread_count
from localvlm.engine.native import ROW_GENERATED, Tap
from localvlm.engine.rows import PromptRows
from localvlm.engine.staged import Batch, Segment, check_places
from localvlm.errors import ContextOverflow, Interrupted, UsageError

__all__ = ["Cache"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_EMPTY = "nothing has been prefilled yet"
CUT = -1
"""No end of a batch."""


def _nothing() -> None:
    """Nothing was decoded along a draft."""


class Cache:
    """A context that runs all layers, or where image tokens are dropped at layers the last ones: then others beside it,
    one after another, run those before.

    Attributes:
        main: the context that gives logits.
        tapping: attention is recorded, in ``main``.
        staged: the prompt went from layer to layer; nothing of it can be used again.
        last: (n_vocab,) logits after the last row; None before a prefill.
        mend: makes what was decoded along a draft as it is without one; to be called before anything goes after it.
    """

    def __init__(self, model: Model, options: LoadOptions, header: Header, tap: Tap, causal: bool) -> None:
        """``causal``: rows of a picture do not see those after them."""
        self._model, self._options, self._header, self._causal = model, options, header, causal
        self.tap = tap
        self.main = Segment(Context(model, options, tap), causal)
        self._others: list[Segment] = []
        """For the layers before those of ``main``, opened as they were needed; the first ``_used`` are in use."""
        self._reset()

    def _reset(self) -> None:
        self.keys: Int32 = np.zeros((0, 6), np.int32)
        """(cells in use, 6) what those of ``main`` hold: :attr:`PromptRows.keys`."""
        self.stops: list[int] = []
        """Ends of the batches that ran; CUT where rows are kept of one that went on."""
        self.prompt = 0
        """Rows of the last prompt."""
        self._used = 0
        self.tapping = self.staged = False
        self.last: Float32 | None = None
        self.mend: Callable[[], object] = _nothing

    def settle(self) -> None:
        """Puts right the cells that an answer left as they were; nothing may be run after them before."""
        mend, self.mend = self.mend, _nothing
        mend()

    def clear(self) -> None:
        self._reset()
        for segment in (*self._others, self.main):
            segment.clear()

    def close(self) -> None:
        for segment in self._others:
            segment.close()
            segment.tap.close()
        self.main.close()

    def cancel(self) -> None:
        """Stops the graph in progress, from any thread."""
        for segment in (*self._others, self.main):
            segment.tap.cancel()

    def cancel_reset(self) -> None:
        for segment in (*self._others, self.main):
            segment.tap.cancel_reset()

    @property
    def context(self) -> Context:
        """That of ``main``."""
        return self.main.context

    @property
    def segments(self) -> list[Segment]:
        """The contexts in use, in the order of their layers."""
        return [*self._others[: self._used], self.main]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers at which the prompt goes on in another context."""
        return tuple(segment.first for segment in self.segments[1:])

    @property
    def logits(self) -> Float32:
        """(n_vocab,) after the last row.

        Raises:
            UsageError: nothing has been prefilled yet.
        """
        if self.last is None:
            raise UsageError(_EMPTY)
        return self.last

    @property
    def cells(self) -> tuple[int, ...]:
        """KV cells in use in each context that runs, ``main`` first."""
        return (self.main.cells, *(segment.cells for segment in self.segments[:-1]))

    @property
    def taken(self) -> int:
        """KV cells in use of the fullest context."""
        return max(self.cells)

    # prompts

    def opened(self, first: int, end: int, cells: int) -> Segment:
        """An emptied context for the layers [first, end), with ``cells`` at least; ``main`` for the last ones.

        Raises:
            UnsupportedModel: the layers of this model cannot be run apart.
        """
        if end == self._model.n_layer:
            segment = self.main
        else:
            self._used += 1
            segment = self._others[self._used - 1] if self._used <= len(self._others) else self._open(cells)
        segment.clear()
        segment.context.reserve(cells)
        segment.first, segment.end = first, end
        return segment

    def _open(self, cells: int) -> Segment:
        model, options = self._model, self._options
        check_places(model.path.name, model.n_layer, options.gpu_layers, self._header)
        tap = Tap(model.path.name, thread_count(options), options.gpu_layers != 0)
        tap.configure(model.n_layer, model.n_head)
        self._others.append(Segment(Context(model, options, tap, outputs=1, cells=cells), self._causal))
        if self.tap.cancelled:  # while the other was not there to be told
            raise Interrupted()
        return self._others[-1]

    def extended(self, end: int) -> Segment:
        """The context opened last, for its rows to run again, from the layer it ended at up to ``end``. It is emptied,
        so that they come to the same cells.
        """
        segment = self.segments[-2]
        segment.context.clear()
        segment.end = end
        return segment

    def keep(self, n: int) -> None:
        """Removes all but the first ``n`` rows. Those of an M-RoPE picture go together: they have one t."""
        if n == 0:
            self.clear()
            return
        self.mend = _nothing
        self.context.trim(int(self.keys[n - 1, -3]) + 1 if self._model.mrope else n)
        self.keys = self.keys[:n]
        whole = n in self.stops
        self.stops = [*(stop for stop in self.stops if 0 <= stop < n), n if whole else CUT]

    def ran(self, keys: Int32) -> None:
        """A batch went into the cache."""
        self.keys = np.concatenate([self.keys, keys])
        self.stops.append(len(self.keys))

    def filled(self, rows: PromptRows) -> None:
        """All batches of a prompt were run: what is decoded goes after them."""
        self.prompt, self.last = rows.n, self.context.logits()
        self.main.filled(rows)

    # what comes after

    def feed(self, ids: Sequence[int] | Int32, generated: bool = True) -> Float32:
        """Runs tokens after the last row as one batch; (n, n_vocab) logits after each.

        Raises:
            UsageError: nothing has been prefilled yet.
            ContextOverflow, NotEnoughMemory: there is no room; nothing has changed.
            Interrupted: cancelled; the cache is as it was before.
        """
        n = len(ids)
        if self.last is None:
            raise UsageError(_EMPTY)
        if n > self.context.n_batch:
            raise UsageError(f"{n} tokens were fed at once and a batch holds {self.context.n_batch}", "feed fewer")
        if self.taken + n > self.context.n_ctx:
            raise ContextOverflow(
                f"{self.taken} cells are taken, {n} more were asked for and the context has {self.context.n_ctx}",
                "raise --ctx-size",
            )
        for segment in self.segments:
            segment.context.reserve(segment.cells + n)
        hidden: Float32 | None = None
        fed: list[Segment] = []
        try:
            for segment in self.segments:
                shift, tapping = None if self._model.mrope else segment.shift, self.tapping and segment is self.main
                row_class = ROW_GENERATED if generated and tapping else 0
                batch = Batch.of_text(np.asarray(ids, np.int32), segment.at, shift, row_class)
                hidden = segment.feed(batch, hidden, tapping)
                fed.append(segment)
        except Interrupted:
            for segment in fed:
                segment.rewind(n)
            raise
        self.ran(batch.keys)
        return np.stack([self.context.logits(i) for i in range(n)])

    def forget(self, n: int) -> None:
        """Takes back the last ``n`` tokens that were fed."""
        for segment in self.segments:
            segment.rewind(n)
        if n:
            self.keys = self.keys[:-n]
            self.stops = [stop for stop in self.stops if stop <= len(self.keys)]
