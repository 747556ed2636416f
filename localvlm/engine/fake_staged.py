"""A prompt on its way through the layers of a :class:`localvlm.engine.fake.FakeVlm`, which add nothing to its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Paused, VlmInfo
from localvlm.errors import UsageError

__all__ = ["FakeStages", "directions"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


def directions(numbers: NDArray[np.generic], width: int) -> Float32:
    """(n, width) rows that differ from number to number."""
    return np.asarray(np.sin(np.asarray(numbers, np.float32)[:, None] * np.arange(1, width + 1)), np.float32)


class FakeStages:
    """Where a paused prompt is, and what it has; ``began``: the image tokens it began with.

    Args:
        token_ids: of the whole prompt.
        image: joint indices of its image tokens that are there.
        rows: (n_image, n_embd) of all of them.
        attention: (n_layer, n_head, n_image) of any text row to them.
    """

    def __init__(self, info: VlmInfo, token_ids: Int32, image: Int32, rows: Float32, attention: Float32) -> None:
        self._info, self._rows, self._attention = info, rows.copy(), attention
        self.began = image
        behind = np.flatnonzero(token_ids < 0).max(initial=-1) + 1
        self.paused = Paused(0, token_ids, image, token_ids[behind:])

    def at(self, layer: int, attend: Sequence[int] | None, hidden: bool) -> Paused:
        """Waits before ``layer``."""
        paused = self.paused
        asked = len(paused.asked(attend)) if layer else 0
        self.paused = Paused(
            layer,
            paused.token_ids,
            paused.image,
            paused.after,
            self._attention[layer - 1][:, paused.image] if asked else None,
            self._rows[paused.image] if hidden else None,
            directions(paused.after, self._info.n_embd) if hidden else None,
        )
        return self.paused

    def resume(
        self, keep: Int32 | None, rows: Float32 | None, layer: int, attend: Sequence[int] | None, hidden: bool
    ) -> Paused:
        """See :meth:`localvlm.engine.api.Vlm.resume`."""
        self._info.check_layer(layer)
        if layer <= self.paused.layer:
            raise UsageError(f"the prompt waits before layer {self.paused.layer} and cannot go on to layer {layer}")
        if layer:
            self.paused.asked(attend)
        self.go(keep, rows)
        return self.at(layer, attend, hidden)

    def go(self, keep: Int32 | None, rows: Float32 | None) -> int:
        """Goes on with the image tokens ``keep``; how many they are."""
        kept = self.paused.kept(keep)
        if rows is not None:
            if rows.shape != (len(kept), self._info.n_embd):
                raise UsageError(f"{len(kept)} rows, {self._info.n_embd} wide, are wanted, and {rows.shape} were given")
            self._rows[kept] = rows
        self.paused = replace(self.paused, image=kept)
        return len(kept)
