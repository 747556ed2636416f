"""The layers of one model in several contexts, so that rows of a prompt can be dropped half-way (llama.cpp has no such
thing: ``native/localvlm_tap.h``, "Staged layers").

Weights are shared. What each context adds is a KV cache, of which the layers that it runs take memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header
from localvlm.engine.llama import Context
from localvlm.engine.rows import PromptRows
from localvlm.errors import Interrupted, UnsupportedModel, UsageError

__all__ = ["Batch", "Segment", "check_places"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


def check_places(name: str, n_layer: int, on_gpu: int, header: Header) -> None:
    """Layers left out must cost nothing and read nothing: with all on one device no weight is moved for them.

    Raises:
        UnsupportedModel: ``on_gpu`` (-1: all) layers lie where they cannot be run apart.
    """
    if 0 < on_gpu <= n_layer:
        raise UnsupportedModel(
            f"'{name}' has {on_gpu} of {n_layer} layers on the GPU, and its layers can be run apart only if all of "
            "them are there, or none",
            "pass -ngl 0 or -ngl -1, or prune before the first layer (--layer 0, --method sgl)",
        )
    if on_gpu and header.integer(f"{header.architecture}.expert_count"):
        raise UnsupportedModel(
            f"the layers of '{name}' cannot be run apart on a GPU: llama.cpp moves its experts by lists that layers "
            "left out would have made",
            "pass -ngl 0, or prune before the first layer (--layer 0, --method sgl)",
        )


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        ids: (n,) token ids.
        embedded: (n, width) rows to run in their place, or None.
        positions: in the batch; see :meth:`Context.decode`.
        true: (n,) positions that the rows shall have, for models with one number a token; None: those of the batch.
        outputs: (n,) int8, whether logits are wanted.
        image: (n,) index of the image token a row is, -1 for others.
        classes: (n,) uint8 bits of enum lv_row_class; not all zero only while attention is recorded.
    """

    ids: Int32
    embedded: Float32 | None
    positions: Int32
    true: Int32 | None
    outputs: NDArray[np.int8]
    image: Int32
    classes: NDArray[np.uint8]

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def moved(self) -> bool:
        return self.true is not None and not np.array_equal(self.true, self.positions)

    @property
    def keys(self) -> Int32:
        """(n, 6) of text; see :attr:`PromptRows.keys`."""
        none, places = np.full(self.n, -1, np.int32), self.positions if self.true is None else self.true
        return np.column_stack([self.ids, none, none, places, places, places])

    @classmethod
    def of_text(cls, ids: Int32, at: int, shift: int | None, row_class: int = 0) -> Batch:
        """Text at batch position ``at``, whose true position is ``shift`` more; None: they are the same."""
        n = len(ids)
        places = np.arange(at, at + n, dtype=np.int32)
        true = None if shift is None else places + np.int32(shift)
        return cls(
            ids, None, places, true, np.ones(n, np.int8), np.full(n, -1, np.int32), np.full(n, row_class, np.uint8)
        )


class Segment:
    """Layers [first, end) in a context with its tap, and the rows that came so far.

    Args:
        causal: rows of a picture do not see those after them.

    Attributes:
        cells: KV cells in use.
        at: batch position of the next row: compact, or the true t of an M-RoPE model.
        shift: true position minus batch position, for models with one number a token.
    """

    def __init__(self, context: Context, causal: bool) -> None:
        self.context, self.tap, self._causal = context, context.tap, causal
        self.clear()

    @property
    def _n_layer(self) -> int:
        return self.context.model.n_layer

    def clear(self) -> None:
        """Forgets all rows, and that layers were left out."""
        self.context.clear()
        self.first, self.end = 0, self._n_layer
        self.cells = self.at = self.shift = 0

    def run(self, batch: Batch, hidden: Float32 | None, tapping: bool, since: int | None = None) -> Float32 | None:
        """(n, n_embd) what the last layer gives, if others follow it, from the ``hidden`` rows before the first one.
        ``since``: the first layer that runs, if the rows have run through those before it in this context. The tap
        stands aside unless attention is recorded, positions differ from the batch's own or layers are left out.

        Raises:
            Interrupted: cancelled; the caller must trim the cache.
        """
        tokens = np.ascontiguousarray(batch.ids) if batch.embedded is None else None
        last, width = self.end == self._n_layer, self.context.model.n_embd
        outputs = batch.outputs if last else np.zeros_like(batch.outputs)
        with self._attending(batch):
            if not (tapping or batch.moved or self.first or not last):
                try:
                    self.context.decode(tokens, batch.embedded, batch.positions, outputs)
                except Interrupted:
                    self.tap.restore()
                    raise
                return None
            if not self.context.tapped:
                raise UsageError("this needs the tap, and the model was loaded without it")
            image = batch.image if tapping else np.full_like(batch.image, -1)  # the tap else counts no image tokens
            self.tap.begin(
                np.ascontiguousarray(image), np.ascontiguousarray(batch.classes), batch.true if batch.moved else None
            )
            try:
                if self.first or not last:
                    rows = None if hidden is None else np.ascontiguousarray(hidden)
                    first = self.first if since is None else since
                    self.tap.stage(first, self.end, width, rows, keep=since is not None)
                self.context.decode(tokens, batch.embedded, batch.positions, outputs)
            finally:
                self.tap.end()
        return None if last else self.tap.stage_read(batch.n, width)

    @contextlib.contextmanager
    def _attending(self, batch: Batch) -> Iterator[None]:
        """Rows of a picture see each other in both directions where the model was trained so."""
        import llama_cpp

        if self._causal or batch.embedded is None:
            yield
            return
        llama_cpp.llama_set_causal_attn(self.context.handle, False)
        try:
            yield
        finally:
            llama_cpp.llama_set_causal_attn(self.context.handle, True)

    def filled(self, rows: PromptRows) -> None:
        """All rows of a prompt have run: what is fed goes after them."""
        mrope = self.context.model.mrope
        self.cells, self.at = rows.n, rows.next_position if mrope else rows.n
        self.shift = 0 if mrope else rows.next_position - rows.n

    def feed(self, batch: Batch, hidden: Float32 | None, tapping: bool) -> Float32 | None:
        """Runs text after the rows that are there; see :meth:`run`.

        Raises:
            Interrupted: cancelled; the cache is as it was before.
        """
        try:
            out = self.run(batch, hidden, tapping)
        except Interrupted:
            self.context.trim(self.at)
            raise
        self.at += batch.n
        self.cells += batch.n
        return out

    def rewind(self, n: int) -> None:
        """Forgets the last ``n`` rows that were fed."""
        self.at -= n
        self.cells -= n
        self.context.trim(self.at)

    def close(self) -> None:
        self.context.close()
