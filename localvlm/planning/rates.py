"""What this machine takes for a weight, a cell, a patch: seconds, and with shapes the seconds of each stage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from localvlm.planning.shapes import Llm, Tower

__all__ = ["KNOTS", "STEP", "TILED", "Rates", "cells_of", "increasing"]

KNOTS = (1, 8, 32, 128, 256)
"""Rows of the batches that are sampled: a weight is read once for all rows, so small batches take more a row."""
TILED = 64
"""Rows from which on llama.cpp's flash attention takes them in tiles (``ggml/src/ggml-cpu/common.h``)."""
STEP = 512
"""Rows of the largest batch (``MICRO_BATCH`` in ``engine/llama.py``)."""


@dataclass(frozen=True)
class Rates:
    """Seconds.

    Attributes:
        rows: by type and shape of a layer, what a batch of KNOTS rows takes for one weight.
        patch: by type of the weights, what a patch takes for one weight of a tower.
        cell: what a row takes for a cell and a channel in one layer, in batches below TILED rows and from there on.
        pair: what a patch takes for another one and a channel in one block of a tower.
        layer: what a layer takes for a batch of any size.
        tile: what a tile takes beside.
        load: what a byte of a file takes that is in memory already.
        step: what a prompt takes beside its layers.
    """

    rows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    patch: Mapping[str, float] = field(default_factory=dict)
    cell: tuple[float, float] = (0.0, 0.0)
    pair: float = 0.0
    layer: float = 0.0
    tile: float = 0.0
    load: float = 0.0
    step: float = 0.0

    def missing(self, llms: Iterable[Llm], towers: Iterable[Tower]) -> tuple[list[str], list[str]]:
        """Weights of LLMs, by type and shape, and of towers, by type, that no rate is known of."""
        blocks = {name for llm in llms for name in (*llm.blocks, *llm.head)}
        patches = {name for tower in towers for name in (*tower.patch, *tower.token)}
        return sorted(blocks - self.rows.keys()), sorted(patches - self.patch.keys())

    def weight(self, kind: str, rows: int) -> float:
        """What a batch takes for one weight: straight lines between the knots, in proportion beyond the last."""
        known = self.rows[kind]
        if rows >= KNOTS[-1]:
            return known[-1] * rows / KNOTS[-1]
        i = bisect_right(KNOTS, rows) - 1
        (r0, r1), (t0, t1) = KNOTS[i : i + 2], known[i : i + 2]
        return t0 + (t1 - t0) * (rows - r0) / (r1 - r0)

    def batch(self, llm: Llm, rows: int, before: int = 0, outputs: int = 1) -> float:
        """A batch of rows after ``before`` cells, of which ``outputs`` have logits."""
        if rows <= 0:
            return 0.0
        seconds = sum(n * self.weight(kind, rows) for kind, n in llm.blocks.items())
        if outputs:
            seconds += sum(n * self.weight(kind, outputs) for kind, n in llm.head.items())
        attended = llm.n_layer * llm.width * cells_of(rows, before)
        return seconds + self.cell[rows >= TILED] * attended + self.layer * llm.n_layer

    def prompt(self, llm: Llm, batches: Sequence[int], before: int = 0) -> float:
        """Batches one after the other, the last row of the last one with logits."""
        seconds = self.step
        for i, rows in enumerate(batches):
            seconds += self.batch(llm, rows, before, outputs=int(i == len(batches) - 1))
            before += rows
        return seconds

    def decoded(self, llm: Llm, tokens: int, before: int) -> float:
        """An answer of ``tokens`` after ``before`` cells: all but the first are each fed from the one before."""
        fed = max(tokens - 1, 0)
        return fed * self.batch(llm, 1, before + fed // 2)

    def tile_of(self, tower: Tower, patches: int, tokens: int, *, shared: bool = False) -> float:
        """One pass of a tower; ``shared``: of its projector alone, on what another VLM's tower gave."""
        if shared:
            return self.tile + sum(n * self.patch[kind] for kind, n in tower.token.items()) * tokens
        inside = sum(n * self.patch[kind] for kind, n in tower.patch.items())
        after = sum(n * self.patch[kind] for kind, n in tower.token.items())
        attended = self.pair * tower.width * tower.pairs(patches)
        return self.tile + inside * patches + after * tokens + attended


def cells_of(rows: int, before: int) -> float:
    """Cells that all rows of a batch attend to, each to those before it and to itself."""
    return rows * before + rows * (rows + 1) / 2


def increasing(values: Sequence[float]) -> tuple[float, ...]:
    """The same, none below the one before: a larger batch takes no less."""
    out = list(values)
    for i, (a, b) in enumerate(pairwise(values)):
        out[i + 1] = max(a, b, out[i])
    return tuple(out)
