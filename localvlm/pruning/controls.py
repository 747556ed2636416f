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


def _spread(shown: Int32, raster: tuple[int, int] | None, k: int) -> Int32:
    """Picks k of one picture's candidates: on a lattice if they fill a rectangle of its raster, else by steps."""
    if raster is not None and k:
        (top, bottom), (left, right) = ((v.min(), v.max() + 1) for v in np.divmod(shown, raster[1]))
        rows, columns = int(bottom - top), int(right - left)
        if rows * columns == len(shown):
            y, x = np.divmod(lattice(rows, columns, k), columns)
            return np.asarray((y + top) * raster[1] + x + left, np.int32)
    steps = ((np.arange(k) + 0.5) * len(shown) / max(k, 1)).astype(int)
    return np.asarray(shown[steps], np.int32)


def grid(inputs: Inputs, k: int) -> Int32:
    """Evenly spaced tokens, shared among the pictures by their candidates; padding is stepped over."""
    starts = np.cumsum([0, *inputs.counts])
    ends = np.searchsorted(inputs.candidates, starts)
    shares = np.diff(np.round(ends * k / len(inputs.candidates)).astype(int))
    kept = []
    for i, (raster, share) in enumerate(zip(inputs.grids, shares, strict=True)):
        shown = inputs.candidates[ends[i] : ends[i + 1]] - starts[i]
        kept.append(_spread(shown, raster, int(share)) + starts[i])
    return np.concatenate(kept).astype(np.int32)


NONE = Method("none", "nothing is pruned", keep_all)
RANDOM = Method("random", "tokens drawn at random (control)", random)
GRID = Method("grid", "tokens evenly spaced (control)", grid)
