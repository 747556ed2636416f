"""What the methods that give a row for each region of a picture share: square regions of a raster of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import UsageError
from localvlm.pruning.base import Inputs, Int32, Kept

__all__ = ["HEAD", "cells", "centres", "heads", "normed", "pooled", "shares", "side_for", "softmax"]

Float32 = NDArray[np.float32]

EPS = np.float32(1e-5)
HEAD = 64
"""Channels of a head of attention."""


def shares(sides: tuple[int, ...]) -> tuple[float, ...]:
    """Of the tokens, that regions of those sides leave."""
    return tuple(1 / side**2 for side in sides)


def side_for(sides: tuple[int, ...], n: int, k: int) -> int:
    """The smallest of the rising ``sides`` whose regions leave at most k of n tokens; the largest if none does."""
    return next((side for side in sides if n // side**2 <= k), sides[-1])


def cells(rows: Float32, grid: tuple[int, int], side: int) -> Float32:
    """(rows of a raster, d) -> (regions, side * side, d), both in raster order. Regions that reach beyond the raster
    repeat its last row and column.
    """
    high, wide = (-(-length // side) for length in grid)
    beyond = (0, high * side - grid[0]), (0, wide * side - grid[1]), (0, 0)
    raster = np.pad(rows.reshape(*grid, -1), beyond, mode="edge")
    split = raster.reshape(high, side, wide, side, -1).transpose(0, 2, 1, 3, 4)
    return split.reshape(high * wide, side * side, -1)


def centres(grid: tuple[int, int], side: int) -> Int32:
    """(regions,) the token at the centre of each, the upper left one of four."""
    down, along = (
        np.minimum(np.arange(0, length, side) + (side - 1) // 2, length - 1).astype(np.int32) for length in grid
    )
    return (down[:, None] * np.int32(grid[1]) + along).ravel()


def pooled(inputs: Inputs, side: int, pool: Callable[[Float32], Float32], name: str) -> Kept:
    """``pool`` of the cells of every picture, (regions, side * side, d) -> (regions, d), at the regions' centres.

    Raises:
        UsageError: the tokens of a picture form no raster.
    """
    assert inputs.features is not None
    index, rows, first = [], [], 0
    for grid, count in zip(inputs.grids, inputs.counts, strict=True):
        if grid is None:
            raise UsageError(
                f"method '{name}' cuts pictures into square regions, and the tokens of this one form no raster",
                "choose another method",
            )
        index.append(np.int32(first) + centres(grid, side))
        rows.append(pool(cells(inputs.features[first : first + count], grid, side)))
        first += count
    at = np.concatenate(index)
    shown = np.isin(at, inputs.candidates)
    return Kept(at[shown], np.concatenate(rows)[shown])


def heads(x: Float32) -> Float32:
    """(..., d) -> (..., heads, HEAD)."""
    return x.reshape(*x.shape[:-1], -1, HEAD)


def normed(x: Float32, weight: Float32) -> Float32:
    """RMSNorm of the rows of x."""
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight, np.float32)


def softmax(x: Float32) -> Float32:
    """Over the last axis."""
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)
