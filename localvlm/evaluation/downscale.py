"""The control ``downscale``: a picture in as few tokens as a method keeps, without choosing among them.

A tower of any size gets a smaller picture, a tiled one a picture of fewer tiles. Where the fewest tokens that these
give are too many, as those of a tower of one size are, the projected rows are averaged over areas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, ImageLayout, Vlm
from localvlm.images import Image
from localvlm.pruning import Kept, share_of
from localvlm.pruning.base import shares
from localvlm.selection import on_picture

__all__ = ["area_pooled", "grid_within", "pooled", "pooled_within", "resized", "shrunk", "what_was_done"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Size = tuple[int, int]

_SIZES = 64
"""Sizes of a picture that are tried when it is made smaller, evenly apart."""


def shrunk(layout: Callable[[int, int], ImageLayout], size: Size, keep: float) -> Size:
    """The size, of the same shape, at which a picture takes most tokens within ``keep`` of its own, or where none does
    the fewest; of several such sizes the largest.
    """
    sizes = dict.fromkeys((max(1, size[0] * k // _SIZES), max(1, size[1] * k // _SIZES)) for k in range(_SIZES, 0, -1))
    tokens = {at: layout(*at).n_tokens for at in sizes}
    budget = share_of(keep, tokens[size])
    within = [at for at, n in tokens.items() if n <= budget]
    return max(within, key=lambda at: tokens[at]) if within else min(tokens, key=lambda at: tokens[at])


def resized(image: Image, size: Size) -> NDArray[np.uint8]:
    """The picture at (width, height)."""
    return np.asarray(PIL.Image.fromarray(image.rgb).resize(size, PIL.Image.Resampling.LANCZOS))


def pooled_within(vlm: Vlm, picture: Encoded, k: int) -> Kept | None:
    """:func:`pooled` of a picture that has more than k tokens; None where there is no need, or no way."""
    return pooled(picture.layout, vlm.features(picture), k) if picture.layout.n_tokens > k else None


def pooled(layout: ImageLayout, features: Float32, k: int) -> Kept | None:
    """At most k tokens that show all of a picture: on each tile's raster, padding left out, a coarser one is laid, and
    each of its cells is the mean of the (n_tokens, d) ``features`` it covers, in the place nearest to its centre. None
    where the tokens are not known to form rasters.
    """
    rasters = _rasters(layout)
    if rasters is None:
        return None
    index, rows = [np.zeros(0, np.int32)], [features[:0]]
    for raster, share in zip(rasters, shares(k, [r.size for r in rasters]), strict=True):
        if share:
            height, width = raster.shape
            grid = grid_within(height, width, share)
            index.append(raster[np.ix_(*map(_centres, raster.shape, grid))].reshape(-1))
            rows.append(area_pooled(features[raster], grid).reshape(-1, features.shape[1]))
    order = np.argsort(np.concatenate(index))  # rows of tiles may lie in one another's midst
    return Kept(np.concatenate(index)[order], np.concatenate(rows)[order])


def grid_within(rows: int, columns: int, k: int) -> Size:
    """(rows, columns) of the raster of most cells, k at most, that has the shape of a larger one but for one row or
    column more or less along its longer side.
    """
    short, long = sorted((rows, columns))
    options = [(a, min(long, k // a, a * long // short + 1)) for a in range(1, min(short, k) + 1)]
    off = {(a, b): abs(b - a * long / short) for a, b in options}
    alike = [o for o in options if o[0] == 1 or off[o] <= 1]
    a, b = max(alike, key=lambda o: (o[0] * o[1], -off[o]))
    return (a, b) if rows <= columns else (b, a)


def area_pooled(rows: Float32, grid: Size) -> Float32:
    """(h, w, d) -> (*grid, d): the mean over each cell's area, rows that it covers in part counted in part."""
    down, across = (_shares_covered(n, cells) for n, cells in zip(rows.shape, grid, strict=False))
    return np.asarray(np.einsum("ay,bx,yxd->abd", down, across, rows, optimize=True), np.float32)


def _shares_covered(n: int, cells: int) -> NDArray[np.float64]:
    """(cells, n): of each of ``cells`` even parts of n places, the share that lies in each place."""
    ends = np.arange(cells + 1)[:, None] * n / cells
    places = np.arange(n)
    covered = np.minimum(ends[1:], places + 1) - np.maximum(ends[:-1], places)
    return np.asarray(np.maximum(covered, 0) * cells / n)


def _centres(n: int, cells: int) -> Int32:
    """(cells,) of n places those that hold the centres of ``cells`` even parts."""
    return ((np.arange(cells) + 0.5) * n / cells).astype(np.int32)


def _rasters(layout: ImageLayout) -> list[Int32] | None:
    """(rows, columns) indices of the tokens of each tile that show any of the picture."""
    if layout.boxes is None:
        return None
    left, top = layout.boxes[:, 0], layout.boxes[:, 1]
    shown = np.flatnonzero(on_picture(layout)).astype(np.int32)
    tiles = np.zeros(layout.n_tokens, np.int32) if layout.tiles is None else layout.tiles
    found = []
    for tile in np.unique(tiles[shown]):
        here = shown[tiles[shown] == tile]
        columns = np.count_nonzero(top[here] == top[here[0]])
        if len(here) % columns:
            return None
        raster = here.reshape(-1, columns)
        if (left[raster] != left[raster[0]]).any() or (top[raster] != top[raster[:, :1]]).any():
            return None
        found.append(raster)
    return found


def what_was_done(
    before: Sequence[ImageLayout], after: Sequence[ImageLayout], picked: Sequence[Kept | None]
) -> list[str]:
    """In words, from the layouts of the pictures as they are and as they were encoded, and what was pooled of them."""
    fewer = [(b, a) for b, a in zip(before, after, strict=True) if a.n_tokens < b.n_tokens]
    tiles = [a.n_tiles < b.n_tiles for b, a in fewer]
    pooled_too = any(kept is not None for kept in picked)
    done = ("fewer tiles", any(tiles)), ("smaller picture", not all(tiles)), ("pooled", pooled_too)
    return [words for words, so in done if so]
