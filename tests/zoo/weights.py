"""Seeded random weights from numpy alone, by Hugging Face parameter name.

Scales are chosen so that nothing degenerates: with inputs of unit variance a ``gain`` of 1 keeps unit variance, and
queries and keys get 1.4, so that attention scores have a standard deviation of about 2 and heads differ in entropy.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHARP", "Float32", "Weights"]

Float32 = NDArray[np.float32]
SHARP = 1.4
"""Gain of query and key matrices."""


class Weights:
    """Collects tensors; each has a stream of its own, so that adding one does not change the others.

    ``RandomState`` and not ``Generator``: numpy has frozen its stream.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.tensors: dict[str, Float32] = {}

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        random = np.random.RandomState((zlib.crc32(name.encode()) + self._seed) % 2**32)
        self.tensors[name] = (mean + std * random.standard_normal(shape)).astype(np.float32)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """(out, in...) of variance gain^2 / in."""
        self.normal(name, *shape, std=gain / math.sqrt(math.prod(shape[1:])))

    def bias(self, name: str, n: int) -> None:
        self.normal(name, n, std=0.1)

    def norm(self, name: str, n: int, *, bias: bool = False) -> None:
        """A normalisation's scale near 1, and its shift."""
        self.normal(f"{name}.weight", n, std=0.1, mean=1.0)
        if bias:
            self.bias(f"{name}.bias", n)

    def linear(self, name: str, out: int, fan_in: int, *, bias: bool, gain: float = 1.0) -> None:
        self.matrix(f"{name}.weight", out, fan_in, gain=gain)
        if bias:
            self.bias(f"{name}.bias", out)

    def attention(self, name: str, width: int, *, out: str = "out_proj", bias: bool = True) -> None:
        """A ViT's four matrices."""
        for part, gain in (("q_proj", SHARP), ("k_proj", SHARP), ("v_proj", 1.0), (out, 1.0)):
            self.linear(f"{name}.{part}", width, width, bias=bias, gain=gain)
