"""The token embedding rows of a model file, so that text and image rows can share one batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header

__all__ = ["TokenTable", "vector"]

UNSCALED = frozenset({"llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3vlmoe"})
"""Architectures whose graph feeds token embeddings to the first layer as they are."""


class TokenTable:
    """Rows of ``token_embd.weight``, dequantised on demand. Where a model's input is wider (deepstack features lie
    behind the embedding), the rest of a text row is zero, as in llama.cpp's graphs.
    """

    def __init__(self, header: Header, width: int) -> None:
        tensor = header.tensors["token_embd.weight"]
        self._kind, self._width = tensor.type, width
        self._data = np.memmap(header.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,)).reshape(
            tensor.shape[1], -1
        )

    @classmethod
    def open(cls, header: Header, width: int) -> TokenTable | None:
        """The table, or None where text rows cannot be given as embeddings exactly."""
        tensor = header.tensors.get("token_embd.weight")
        if header.architecture not in UNSCALED or tensor is None or width % tensor.shape[0]:
            return None
        table = cls(header, width)
        try:
            table.rows(np.zeros(1, np.int32))
        except (NotImplementedError, ValueError):
            return None
        return table

    def rows(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n, width) float32 embeddings of (n,) token ids."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.ascontiguousarray(self._data[ids])
        found = np.asarray(dequantize(raw, GGMLQuantizationType(self._kind)), np.float32)
        return np.pad(found, ((0, 0), (0, self._width - found.shape[1])))


def vector(header: Header, name: str) -> NDArray[np.float32]:
    """A tensor of one dimension, as float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = header.tensors[name]
    raw = np.fromfile(header.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    kind = GGMLQuantizationType(tensor.type)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    return np.asarray(dequantize(raw if plain is None else raw.view(plain), kind), np.float32).reshape(-1)
