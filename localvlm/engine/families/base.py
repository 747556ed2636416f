"""What a VLM family is: how it cuts a picture into tiles, and where the rows of its prompt lie in the picture.

A family says this for one projector file, by numbers alone: nothing here runs a model or knows of llama.cpp. A picture
becomes a list of texts (control tokens between tiles) and :class:`Block` s, in the order of the prompt; a block is one
or several :class:`Tile` s, each one pass of the vision tower over a picture of exactly the tower's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header
from localvlm.errors import ImageError

__all__ = [
    "NUMBER",
    "Block",
    "Cut",
    "Family",
    "Float32",
    "Int32",
    "Opener",
    "Patches",
    "Projector",
    "Size",
    "Tile",
    "Tower",
    "draw",
    "merged",
    "one_to_one",
    "whole",
]

STRIP = 1 << 22
"""Pixels of a canvas that are drawn at a time."""
MAX_CANVAS = 1 << 30
"""Most pixels of one."""
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
RGB = NDArray[np.uint8]
Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Tile:
    """A part of the picture at tower size.

    The picture is laid on a ground (``canvas``), resized to each of ``sizes`` in turn, and ``crop`` is cut out, all in
    Pillow's arithmetic, which is what models were trained with. A crop may reach beyond the picture: that is padding.

    Attributes:
        sizes: (width, height) after each resize; empty: the picture as it is.
        crop: x0, y0, x1, y1 in pixels after resizing.
        rows, columns: of the raster of tokens that the tower makes of it.
        canvas: width, height, left, top in pixels of the picture: laid on a ground of that size first.
        ground: RGB of canvas and padding.
        resample: Pillow's filter.
        row_end: one more row of the tower's output follows each row of tokens and shows nothing ([IMG_BREAK]), but for
            the last.
        view: (width, height) of the part of the crop, from its left top corner, that the tokens cover; None: all.
    """

    sizes: tuple[Size, ...]
    crop: tuple[int, int, int, int]
    rows: int
    columns: int
    canvas: tuple[int, int, int, int] | None = None
    ground: tuple[int, int, int] = (0, 0, 0)
    resample: str = "BICUBIC"
    row_end: bool = False
    view: Size | None = None

    @property
    def n(self) -> int:
        """Rows that the tower gives."""
        return self.rows * self.columns + (self.rows - 1 if self.row_end else 0)

    def boxes(self, width: int, height: int) -> Float32:
        """(n, 4) x0, y0, x1, y1 of each row in pixels of a width x height picture, clipped; empty on padding and for
        rows that show nothing.
        """
        x0, y0, x1, y1 = self.crop
        view_w, view_h = self.view or (x1 - x0, y1 - y0)
        full_w, full_h, left, top = self.canvas or (width, height, 0, 0)
        last_w, last_h = self.sizes[-1] if self.sizes else (full_w, full_h)
        x = np.clip(np.linspace(x0, x0 + view_w, self.columns + 1) * (full_w / last_w) - left, 0, width)
        y = np.clip(np.linspace(y0, y0 + view_h, self.rows + 1) * (full_h / last_h) - top, 0, height)
        boxes = np.zeros((self.rows, self.columns + self.row_end, 4), np.float32)
        c = self.columns
        boxes[:, :c, 0], boxes[:, :c, 2] = x[None, :-1], x[None, 1:]
        boxes[:, :c, 1], boxes[:, :c, 3] = y[:-1, None], y[1:, None]
        return boxes.reshape(-1, 4)[: self.n]

    def scale(self, width: int, height: int) -> float:
        """Pixels that the tower is given of each pixel of a side of a width x height picture."""
        full_w, full_h, *_ = self.canvas or (width, height)
        last_w, last_h = self.sizes[-1] if self.sizes else (full_w, full_h)
        return min(last_w / full_w, last_h / full_h)

    def shows(self) -> NDArray[np.bool_]:
        """(n,) whether a row is a token of the picture (padding counts) and not the end of a row."""
        out = np.ones((self.rows, self.columns + self.row_end), bool)
        out[:, self.columns :] = False
        return out.reshape(-1)[: self.n]


@dataclass(frozen=True)
class Block:
    """Consecutive rows of the prompt that come from a picture.

    Attributes:
        tiles: what the tower runs on.
        order: (n,) int32, for each row of the prompt its index among the tiles' rows put one after another; -1 is the
            family's row end (``Family.row_end``). None: as they come.
    """

    tiles: tuple[Tile, ...]
    order: Int32 | None = None

    @property
    def n(self) -> int:
        return sum(t.n for t in self.tiles) if self.order is None else len(self.order)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each tile's rows begin among all tiles' rows."""
        return (0, *accumulate(t.n for t in self.tiles))

    def boxes(self, width: int, height: int) -> Float32:
        """(n, 4) of the rows of the prompt; see :meth:`Tile.boxes`."""
        return self.gather(np.concatenate([t.boxes(width, height) for t in self.tiles]), np.float32(0))

    def places(self) -> Int32:
        """(n, 2) tile, and row among those of the tile, of each row of the prompt; -1, -1: the family's row end."""
        within = [np.arange(t.n, dtype=np.int32) for t in self.tiles]
        tile = np.repeat(np.arange(len(within), dtype=np.int32), [len(rows) for rows in within])
        return self.gather(np.stack([tile, np.concatenate(within)], axis=1), np.int32(-1))

    def shows(self) -> NDArray[np.bool_]:
        """(n,) whether a row of the prompt is a token of the picture."""
        return self.gather(np.concatenate([t.shows() for t in self.tiles]), np.bool_(False))

    def gather(self, rows: NDArray[np.generic], end: NDArray[np.generic] | np.generic) -> NDArray:  # type: ignore[type-arg]
        """(sum of tile rows, ...) -> (n, ...), ``end`` where the prompt has a row end."""
        if self.order is None:
            return rows
        out = rows[np.maximum(self.order, 0)]
        out[self.order < 0] = end
        return out

    @property
    def raster(self) -> Size | None:
        """(rows, columns) if the tokens of the picture form one raster."""
        return (self.tiles[0].rows, self.tiles[0].columns) if len(self.tiles) == 1 else None


Cut = Sequence[str | Block]
"""A picture in the prompt: texts in which control tokens are recognised, and blocks."""
NUMBER = "{number}"
"""Stands in the first text of a cut for how many pictures the prompt has before this one."""


@dataclass(frozen=True)
class Tower:
    """The vision tower of one projector file.

    Attributes:
        n_layer: blocks that llama.cpp runs, or those of them whose attention is recorded.
        cls: whether a CLS row is appended after the patches.
        merge: patches per token along each side.
        patch, image_size: pixels; image_size is the side of a fixed-size input.
        full_layers: blocks whose attention spans the tile; None: all.
        n_block: blocks that llama.cpp runs, where they are not ``n_layer``.
    """

    n_layer: int
    cls: bool
    merge: int
    patch: int
    image_size: int
    full_layers: tuple[int, ...] | None = None
    n_block: int = 0

    @property
    def last(self) -> int:
        """The last block that llama.cpp runs."""
        return (self.n_block or self.n_layer) - 1


@dataclass(frozen=True)
class Projector:
    """A projector file's header, and the most tokens that a picture may have where the family takes any size (0: the
    family's own bound).
    """

    header: Header
    max_tokens: int = 0


@dataclass(frozen=True)
class Patches:
    """The rows of a tower's attention over one tile, CLS apart.

    Attributes:
        rows, columns: of the raster of patches.
        tile: what they show.
        window: the tower's ``inv_window_idx`` input, None if it has none.
    """

    rows: int
    columns: int
    tile: Tile
    window: Int32 | None = None


def one_to_one(patches: Patches) -> Int32:
    """Patch i is token i."""
    return np.arange(patches.rows * patches.columns, dtype=np.int32)


def merged(patches: Patches) -> Int32:
    """Patches in raster order; each token of the tile's raster is a rectangle of them."""
    tile = patches.tile
    r = np.arange(patches.rows) * tile.rows // patches.rows
    c = np.arange(patches.columns) * tile.columns // patches.columns
    return (r[:, None] * (tile.columns + tile.row_end) + c).astype(np.int32).reshape(-1)


@dataclass(frozen=True)
class Family:
    """How one projector file lays out pictures.

    Attributes:
        name: row of the table; "unknown" has no token map.
        source: where the layout is published.
        cut: (width, height) of a picture -> texts and blocks. None: left to llama.cpp, places unknown.
        token_of_patch: for each row of the tower's attention, the row of the tile it belongs to, (n_patches,) int32.
        row_end: tensor of the projector file that is put where ``Block.order`` is -1.
        bounds: fewest and most tokens of a tile, as mtmd is told, so that it leaves tiles as they are; -1: its own.
        repairs: names of the repairs its tower needs (``engine/native.py``, REPAIRS).
        text_positions: a picture's rows take one position each, as text does, in M-RoPE models too.
        notes: what these files lack, or what could not be known of them, for ``-v``.
    """

    name: str
    source: str
    tower: Tower
    cut: Callable[[int, int], Cut] | None = None
    token_of_patch: Callable[[Patches], Int32] = one_to_one
    row_end: str = ""
    bounds: tuple[int, int] = (-1, -1)
    repairs: tuple[str, ...] = ()
    text_positions: bool = False
    notes: tuple[str, ...] = ()


Opener = Callable[[Projector], Family | None]
"""Reads a projector file's header; None: not this family after all."""


def whole(width: int, height: int, size: Size, rows: int, columns: int, resample: str = "BICUBIC") -> Tile:
    """The whole picture stretched to ``size``, the commonest tile."""
    sizes = () if (width, height) == size else (size,)
    return Tile(sizes, (0, 0, *size), rows, columns, resample=resample)


class _Drawer:
    """Draws tiles of one picture, keeping the last resized one."""

    def __init__(self, picture: RGB) -> None:
        self._picture = picture
        self._key: object = None
        self._last: RGB = picture

    def tile(self, tile: Tile) -> RGB:
        key = (tile.canvas, tile.ground, tile.sizes, tile.resample)
        if key != self._key:
            self._last, self._key = self._resized(tile), key
        x0, y0, x1, y1 = tile.crop
        height, width = self._last.shape[:2]
        if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
            return np.ascontiguousarray(self._last[y0:y1, x0:x1])
        return _laid(self._last, (x1 - x0, y1 - y0), (-x0, -y0), tile.ground)

    def _resized(self, tile: Tile) -> RGB:
        out, sizes = self._picture, tile.sizes
        if tile.canvas is not None and sizes:
            out, sizes = _laid_and_resized(out, tile.canvas, tile.ground, sizes[0], tile.resample), sizes[1:]
        elif tile.canvas is not None:
            width, height, *at = tile.canvas
            out = _laid(out, (width, height), (at[0], at[1]), tile.ground)
        for size in sizes:
            out = _resize(out, size, tile.resample)
        return out


def _resize(picture: RGB, size: Size, resample: str) -> RGB:
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(picture).resize(size, PIL.Image.Resampling[resample]))


def _laid_and_resized(
    picture: RGB, canvas: tuple[int, int, int, int], ground: tuple[int, int, int], size: Size, resample: str
) -> RGB:
    """:func:`_laid` and resized, bit for bit, in strips, since most of a canvas may be ground: Pillow resizes rows
    before columns, and rows do not depend on each other.

    Raises:
        ImageError: the canvas is over MAX_CANVAS.
    """
    width, height, left, top = canvas
    if width * height > MAX_CANVAS:
        raise ImageError(
            f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels is too long for this model, which sees squares",
            "crop it, or choose another model",
        )
    rows = max(1, STRIP // width)
    strips = [
        _resize(_laid(part, (width, len(part)), (left, 0), ground), (size[0], len(part)), resample)
        for part in (picture[i : i + rows] for i in range(0, len(picture), rows))
    ]
    return _resize(_laid(np.concatenate(strips), (size[0], height), (0, top), ground), size, resample)


def _laid(picture: RGB, size: Size, at: tuple[int, int], ground: tuple[int, int, int]) -> RGB:
    """The picture on a ground of ``size`` with its left top corner ``at``; what lies outside is cut off."""
    out = np.empty((size[1], size[0], 3), np.uint8)
    out[:] = ground
    left, top = at
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size[0]), min(top + height, size[1])
    if x1 > x0 and y1 > y0:
        out[y0:y1, x0:x1] = picture[y0 - top : y1 - top, x0 - left : x1 - left]
    return out


def draw(picture: RGB, tiles: Sequence[Tile]) -> list[RGB]:
    """The pixels of tiles of one picture, (height, width, 3) uint8 each."""
    drawer = _Drawer(picture)
    return [drawer.tile(t) for t in tiles]
