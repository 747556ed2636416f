"""What the rows' models in transformers share. torch is imported in methods alone: rows are read without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.zoo.row import RGB, Int32
from tests.zoo.weights import Float32

__all__ = ["HfReference", "per_token"]


class HfReference:
    """A :class:`tests.zoo.row.Reference`: what is left to a family is to build its model, and :meth:`encode`."""

    def __init__(self, model: Any, tensors: Mapping[str, Float32], text: Any = None, *, window: int = 0) -> None:
        """``text`` and ``window``: see :class:`tests.zoo.reference.Decoder`."""
        import torch

        from tests.zoo.reference import Decoder

        self._torch, self._model = torch, model.eval()
        self._model.load_state_dict({k: torch.from_numpy(t) for k, t in tensors.items()}, strict=True)
        self.decoder = Decoder(self._model, text, window=window)

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        """What the tower and the projector give: ``pooler_output``, and ``attentions`` if the tower has them."""
        with self._torch.no_grad():
            return self._model.model.get_image_features(*args, **kwargs, return_dict=True)

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """See :meth:`tests.zoo.row.Reference.encode`."""
        raise NotImplementedError

    def encode_stock(self, image: RGB) -> Float32:
        """See :meth:`tests.zoo.row.Reference.encode_stock`."""
        return self.encode(image)[0]

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        """See :meth:`tests.zoo.row.Reference.decode`."""
        return self.decoder.decode(ids, rows, positions)


def per_token(patches: Float32, columns: int, merge: int) -> Float32:
    """(..., n_patches) in raster order -> (..., n_tokens) sums over the merge x merge patches of a token; ``columns``
    of tokens."""
    lead = patches.shape[:-1]
    return np.asarray(patches.reshape(*lead, -1, merge, columns, merge).sum(axis=(-3, -1)).reshape(*lead, -1))
