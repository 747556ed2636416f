"""What the methods that give a row for each region of a picture share: square regions of a raster of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import UsageError
from localvlm.pruning.base import Inputs, Int32, Kept

__all__ = ["cells", "centres", "normed", "pooled", "shares", "side_for", "softmax"]

Float32 = NDArray[np.float32]

EPS = np.float32(1e-5)


def shares(sides: tuple[int, ...]) -> tuple[float, ...]:
    """Of the tokens, that regions of those sides leave."""
    return tuple(1 / side**2 for side in sides)


def side_for(sides: tuple[int, ...], n: int, k: int) -> int:
    """The smallest of the rising ``sides`` whose regions are at most k of n tokens; else the largest."""
    return next((side for side in sides if n <= k * side**2), sides[-1])


def cells(rows: Float32, grid: tuple[int, int], side: int) -> Float32:
    """(rows of a raster, d) -> (regions, side * side, d), both in raster order."""
    high, wide = grid[0] // side, grid[1] // side
    return rows.reshape(high, side, wide, side, -1).transpose(0, 2, 1, 3, 4).reshape(high * wide, side * side, -1)


def centres(grid: tuple[int, int], side: int) -> Int32:
    """(regions,) the token at the centre of each, the upper left one of four."""
    at = cells(np.arange(grid[0] * grid[1], dtype=np.float32)[:, None], grid, side)
    middle = (side - 1) // 2
    return np.asarray(at[:, middle * side + middle, 0], np.int32)


def normed(x: Float32, weight: Float32) -> Float32:
    """RMSNorm of the rows of x."""
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight, np.float32)


def softmax(x: Float32) -> Float32:
    """Over the last axis."""
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)


def pooled(inputs: Inputs, side: int, pool: Callable[[Float32], Float32], name: str) -> Kept:
    """``pool`` of the cells of every picture, (regions, side * side, d) -> (regions, d), at the regions' centres.

    Raises:
        UsageError: the tokens of a picture form no raster that such regions fill.
    """
    assert inputs.features is not None
    index, rows, first = [], [], 0
    for grid, count in zip(inputs.grids, inputs.counts, strict=True):
        if grid is None or grid[0] % side or grid[1] % side:
            shape = "no raster" if grid is None else f"a raster of {grid[0]} x {grid[1]}"
            raise UsageError(
                f"method '{name}' cuts a picture into regions of {side} x {side} tokens, and its tokens form {shape}",
                "choose another method",
            )
        index.append(first + centres(grid, side))
        rows.append(pool(cells(inputs.features[first : first + count], grid, side)))
        first += count
    return Kept(np.concatenate(index), np.concatenate(rows))
