"""The KV cache of one VLM: what it holds, and batches that add to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import Header
from localvlm.engine.llama import Context, Model
from localvlm.engine.native import ROW_GENERATED, Tap
from localvlm.engine.rows import PromptRows
from localvlm.engine.staged import Front
from localvlm.errors import ContextOverflow, Interrupted, UsageError

__all__ = ["Cache"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_EMPTY = "nothing has been prefilled yet"


def _nothing() -> None:
    """Nothing was decoded along a draft."""


class Cache:
    """A context with its tap, and the front beside it where image tokens are dropped at a layer.

    Attributes:
        tapping: attention is recorded.
        layer: where the rows of the prompt were pruned; 0 = before the first layer, without a front.
        last: (n_vocab,) logits after the last row; None before a prefill.
        mend: makes what was decoded along a draft as it is without one; to be called before anything goes after it.
    """

    def __init__(self, model: Model, options: LoadOptions, header: Header, tap: Tap, causal: bool) -> None:
        """``causal``: rows of a picture do not see those after them."""
        self._model, self._options, self._header, self._causal = model, options, header, causal
        self.tap = tap
        self.context = Context(model, options, tap)
        self._front: Front | None = None
        self._reset()

    def _reset(self) -> None:
        self.keys: Int32 = np.zeros((0, 6), np.int32)
        """(cells in use, 6) what they hold: :attr:`PromptRows.keys`."""
        self.stops: list[int] = []
        """Ends of the batches that ran."""
        self.prompt = 0
        """Rows of the last prompt."""
        self._at = 0
        """Batch position of the next row: compact, or the true t of an M-RoPE model."""
        self._shift = 0
        """True position minus batch position, for models with one number a token."""
        self.tapping = False
        self.layer = 0
        self.last: Float32 | None = None
        self.mend: Callable[[], object] = _nothing

    def clear(self) -> None:
        self._reset()
        self.context.clear()
        if self._front is not None:
            self._front.clear()

    def close(self) -> None:
        if self._front is not None:
            self._front.close()
        self.context.close()

    def cancel(self) -> None:
        """Stops the graph in progress, from any thread."""
        if (front := self._front) is not None:
            front.tap.cancel()
        self.tap.cancel()

    def cancel_reset(self) -> None:
        if self._front is not None:
            self._front.tap.cancel_reset()
        self.tap.cancel_reset()

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
        """KV cells in use in each context that runs; the front, where there is one, has all rows and comes last."""
        front, n = self._front_in_use, len(self.keys)
        return (n,) if front is None else (n, front.cells)

    @property
    def taken(self) -> int:
        """KV cells in use of the fullest context."""
        return self.cells[-1]

    @property
    def _front_in_use(self) -> Front | None:
        return self._front if self.layer else None

    # prompts

    def opened_front(self, cells: int) -> Front:
        """With ``cells`` at least."""
        if self._front is not None:
            self._front.context.reserve(cells)
        else:
            self._front = Front(self._model, self._options, self._header, cells)
            if self.tap.cancelled:  # while the front was not there to be told
                raise Interrupted()
        return self._front

    def keep(self, n: int) -> None:
        """Removes all but the first ``n`` rows. Those of an M-RoPE picture go together: they have one t."""
        if n == 0:
            self.clear()
            return
        self.mend = _nothing
        self.context.trim(int(self.keys[n - 1, -3]) + 1 if self._model.mrope else n)
        self.keys = self.keys[:n]
        self.stops = [stop for stop in self.stops if stop < n] + [n]

    def ran(self, keys: Int32) -> None:
        """A batch went into the cache."""
        self.keys = np.concatenate([self.keys, keys])
        self.stops.append(len(self.keys))

    def filled(self, rows: PromptRows) -> None:
        """All batches of a prompt were run: what is decoded goes after them."""
        self.prompt, self.last = rows.n, self.context.logits()
        self._at = rows.next_position if self._model.mrope else rows.n
        self._shift = 0 if self._model.mrope else rows.next_position - rows.n

    @contextlib.contextmanager
    def attending(self, context: Context, embedded: Float32 | None) -> Iterator[None]:
        """Rows of a picture see each other in both directions where the model was trained so."""
        import llama_cpp

        if self._causal or embedded is None:
            yield
            return
        llama_cpp.llama_set_causal_attn(context.handle, False)
        try:
            yield
        finally:
            llama_cpp.llama_set_causal_attn(context.handle, True)

    def run(
        self,
        ids: Int32,
        embedded: Float32 | None,
        positions: Int32,
        outputs: NDArray[np.int8],
        image: Int32,
        classes: NDArray[np.uint8],
        true: Int32 | None,
        hidden: Float32 | None,
    ) -> None:
        """One batch, from ``hidden`` rows on if a front gave them. The tap stands aside unless attention is recorded,
        positions differ from the batch's own or layers are left out.
        """
        moved = true is not None and not np.array_equal(true, positions)
        tokens = np.ascontiguousarray(ids) if embedded is None else None
        if not (self.tapping or moved or hidden is not None):
            self.context.decode(tokens, embedded, positions, outputs)
            return
        if not self.tapping:  # the tap then counts no image tokens
            image = np.full_like(image, -1)
        self.tap.begin(np.ascontiguousarray(image), np.ascontiguousarray(classes), true if moved else None)
        try:
            if hidden is not None:
                self.tap.stage(self.layer, self._model.n_embd, np.ascontiguousarray(hidden))
            self.context.decode(tokens, embedded, positions, outputs)
        finally:
            self.tap.end()

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
        if self.taken + n > self.context.n_ctx:
            raise ContextOverflow(
                f"{self.taken} cells are taken, {n} more were asked for and the context has {self.context.n_ctx}",
                "raise --ctx-size",
            )
        tokens, front = np.asarray(ids, np.int32), self._front_in_use
        self.context.reserve(len(self.keys) + n)
        if front is not None:
            front.context.reserve(front.cells + n)
        hidden = None if front is None else front.feed(self.layer, tokens)
        positions = np.arange(self._at, self._at + n, dtype=np.int32)
        classes = np.full(n, ROW_GENERATED if generated and self.tapping else 0, np.uint8)
        none = np.full(n, -1, np.int32)
        true = None if self._model.mrope else positions + np.int32(self._shift)
        try:
            self.run(tokens, None, positions, np.ones(n, np.int8), none, classes, true, hidden)
        except Interrupted:
            self.context.trim(self._at)
            if front is not None:
                front.rewind(n)
            raise
        self._at += n
        places = (positions if true is None else true)[:, None]
        self.ran(np.column_stack([tokens, none, none, places, places, places]))
        return np.stack([self.context.logits(i) for i in range(n)])

    def forget(self, n: int) -> None:
        """Takes back the last ``n`` tokens that were fed."""
        self._at -= n
        self.context.trim(self._at)
        if n:
            self.keys = self.keys[:-n]
            self.stops = [stop for stop in self.stops if stop <= len(self.keys)]
        if (front := self._front_in_use) is not None:
            front.rewind(n)
