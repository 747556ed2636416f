"""Controls: what any method must beat at the same number of tokens."""

from __future__ import annotations

import numpy as np

from localvlm.pruning.base import Inputs, Int32, Method

__all__ = ["GRID", "NONE", "RANDOM"]


def keep_all(inputs: Inputs, k: int) -> Int32:  # noqa: ARG001
    """Keeps all tokens, padding too."""
    return np.arange(inputs.n, dtype=np.int32)


def random(inputs: Inputs, k: int) -> Int32:
    """Draws k candidates evenly, without replacement."""
    drawn = np.random.default_rng(inputs.seed).choice(inputs.candidates, k, replace=False)
    return np.sort(drawn).astype(np.int32)


def lattice(rows: int, columns: int, k: int) -> Int32:
    """Picks k cells of a rows x columns raster on a lattice as even as k allows."""
    n_rows = int(np.clip(round((k * rows / columns) ** 0.5), -(-k // columns), min(rows, k)))
    counts = np.diff(np.round(np.linspace(0, k, n_rows + 1)).astype(int))
    cells = []
    for i, count in enumerate(counts):
        y = int((i + 0.5) * rows / n_rows)
        x = ((np.arange(count) + 0.5) * columns / count).astype(int)
        cells.append(y * columns + x)
    return np.concatenate(cells).astype(np.int32)


def grid(inputs: Inputs, k: int) -> Int32:
    """Evenly spaced tokens, shared among the pictures by their candidates; padding is stepped over."""
    padded = len(inputs.candidates) < inputs.n
    if len(inputs.counts) == 1 and inputs.grids[0] is not None and not padded:
        return lattice(*inputs.grids[0], k)
    steps = ((np.arange(k) + 0.5) * len(inputs.candidates) / k).astype(int)
    return np.asarray(inputs.candidates[steps], np.int32)


NONE = Method("none", "nothing is pruned", keep_all)
RANDOM = Method("random", "tokens drawn at random (control)", random)
GRID = Method("grid", "tokens evenly spaced (control)", grid)
