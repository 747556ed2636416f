"""The layers of one model in two contexts, so that rows of a prompt can be dropped half-way (llama.cpp has no such
thing: ``native/localvlm_tap.h``, "Staged layers").

The front runs the layers below a cut on the whole prompt. The context that usually runs all layers is then the tail:
it runs the others, on the rows that stay. Weights are shared; what the front adds is a KV cache of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import Header
from localvlm.engine.llama import Context, Model, thread_count
from localvlm.engine.native import Tap
from localvlm.errors import Interrupted, UnsupportedModel

__all__ = ["Front", "check_places"]

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
            "pass -ngl 0 or -ngl -1, or --layer 0",
        )
    if on_gpu and header.integer(f"{header.architecture}.expert_count"):
        raise UnsupportedModel(
            f"the layers of '{name}' cannot be run apart on a GPU: llama.cpp moves its experts by lists that layers "
            "left out would have made",
            "pass -ngl 0 or --layer 0",
        )


class Front:
    """The layers below a cut, for as many rows as the prompt has unpruned.

    Attributes:
        at: batch position of the next row.
        cells: KV cells in use.
    """

    def __init__(self, model: Model, options: LoadOptions, header: Header, cells: int) -> None:
        check_places(model.path.name, model.n_layer, options.gpu_layers, header)
        self.tap = Tap(model.path.name, thread_count(options), options.gpu_layers != 0)
        self.tap.configure(model.n_layer, model.n_head)
        self.context = Context(model, options, self.tap, outputs=1, cells=cells)
        self._width = model.n_embd
        self.at = self.cells = 0

    def decode(self, layer: int, tokens: Int32 | None, embedded: Float32 | None, positions: Int32, n: int) -> Float32:
        """Runs ``n`` rows through the layers below ``layer``: (n, n_embd) hidden rows. See :meth:`Context.decode`.

        Raises:
            Interrupted: the cache is as it was before.
        """
        none = np.full(n, -1, np.int32)
        self.tap.begin(none, np.zeros(n, np.uint8), None)
        try:
            try:
                self.tap.stage(layer, self._width, None)
                self.context.decode(tokens, embedded, positions, np.zeros(n, np.int8))
            finally:
                self.tap.end()
        except Interrupted:
            self.context.trim(self.at)
            raise
        self.cells += n
        return self.tap.stage_read(n, self._width)

    def feed(self, layer: int, ids: Int32) -> Float32:
        """Runs text after the prompt: (n, n_embd) hidden rows."""
        n = len(ids)
        out = self.decode(layer, ids, None, np.arange(self.at, self.at + n, dtype=np.int32), n)
        self.at += n
        return out

    def rewind(self, n: int) -> None:
        """Forgets the last ``n`` rows that were fed."""
        self.at -= n
        self.cells -= n
        self.context.trim(self.at)

    def clear(self) -> None:
        self.context.clear()
        self.at = self.cells = 0

    def close(self) -> None:
        self.context.close()
        self.tap.close()
