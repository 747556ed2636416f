"""What an LLM computes for an answer, counted from the shapes of its tensors: no clock, the same on any machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localvlm.engine.gguf_header import Header, read_model

__all__ = ["LlmShape"]

_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class LlmShape:
    """What one pass of an LLM costs.

    Attributes:
        blocks: weights that each row meets, of the matrices of each block; of experts, the share that is used.
        head: weights of the output's matrix.
        width: channels of the queries, all heads together.
    """

    blocks: tuple[int, ...]
    head: int
    width: int

    @classmethod
    def of(cls, path: Path) -> LlmShape:
        """The shape of a model file.

        Raises:
            ModelError: it cannot be read.
        """
        header = read_model(path)
        arch = header.architecture
        blocks = [0] * header.integer(f"{arch}.block_count")
        for name, tensor in header.tensors.items():
            found = _BLOCK.match(name)
            if found and len(tensor.shape) > 1 and int(found[1]) < len(blocks):
                blocks[int(found[1])] += round(int(np.prod(tensor.shape)) * _used(header, name))
        output = header.tensors.get("output.weight") or header.tensors["token_embd.weight"]
        width = header.integer(f"{arch}.embedding_length")
        heads = header.integer(f"{arch}.attention.head_count", 1)
        return cls(
            tuple(blocks),
            int(np.prod(output.shape)),
            heads * header.integer(f"{arch}.attention.key_length", width // heads),
        )

    @property
    def n_layer(self) -> int:
        return len(self.blocks)

    def flops(self, prompt: int | Sequence[int], fed: int, outputs: int) -> int:
        """Multiplications and additions of ``prompt`` rows and ``fed`` rows after them, ``outputs`` of them projected
        to the vocabulary: 2 per weight and row, and 4 per layer, channel, row and cell that the row attends to. Where
        rows of the prompt are dropped on the way, ``prompt`` has their number in each layer.
        """
        prompts = [prompt] * self.n_layer if isinstance(prompt, int) else prompt
        total = 2 * self.head * outputs
        for weights, rows in zip(self.blocks, (n + fed for n in prompts), strict=True):
            total += 2 * weights * rows + 2 * self.width * rows * (rows + 1)
        return total


def _used(header: Header, name: str) -> float:
    """Share of a tensor's weights that one row meets."""
    if "_exps." not in name:
        return 1.0
    arch = header.architecture
    return header.integer(f"{arch}.expert_used_count", 1) / header.integer(f"{arch}.expert_count", 1)
