"""DyVTE (arXiv 2411.19628): a small trained gate before each layer tells when the text needs no image tokens any more.

Section 4: with the hidden rows x of the text after the picture, the gate of a layer is two linear layers and a GELU,

    down gelu(up [mean of x ; last of x])

(each with its bias), and where its second output, "exit", is above the first, "stay", no image token enters that layer
or one behind it. It is trained to tell where the answer does not change any more without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localvlm.pruning.base import Kept
from localvlm.pruning.in_llm import Cut, InLlm, Seen

__all__ = ["DYVTE", "Gate", "dyvte"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """Weights of one gate: ``up`` (h, 2 d), ``up_bias`` (h,), ``down`` (2, h), ``down_bias`` (2,), all float32."""

    up: Float32
    up_bias: Float32
    down: Float32
    down_bias: Float32

    def exits(self, text: Float32) -> bool:
        """Whether the image tokens leave, by the (t, d) rows of the text after them."""
        hidden = self.up @ np.concatenate([text.mean(axis=0), text[-1]]) + self.up_bias
        stay, leave = self.down @ _gelu(hidden) + self.down_bias
        return bool(leave > stay)


def _gelu(x: Float32) -> Float32:
    """Each value times the normal distribution's share below it."""
    return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()], np.float32)


def dyvte(gates: Mapping[int, Gate]) -> InLlm:
    """The method with the gates of one model, by the layer before which each stands."""

    def cuts(keep: float, n: int, n_layer: int) -> tuple[Cut, ...]:  # noqa: ARG001 - it has a share of its own
        return tuple(Cut(layer, 0) for layer in sorted(gates) if 0 < layer < n_layer) if n else ()

    def select(seen: Seen, k: int) -> Kept:  # noqa: ARG001 - all or none
        assert seen.text is not None
        left = 0 if gates[seen.layer].exits(seen.text) else seen.attention.shape[1]
        return Kept(np.arange(left, dtype=np.int32))

    return InLlm(
        "dyvte", "all image tokens leave where a gate says so (trained; has a share of its own)", cuts, select,
        hidden=True, sweeps=False, trained=dyvte,
    )  # fmt: skip


DYVTE = dyvte({})
"""Without gates: nothing leaves."""
