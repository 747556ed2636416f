"""From pixels to the cells of a terminal: half blocks in colour, braille and shades without.

Pixels are (height, width, 3) uint8 RGB. A cell is about twice as high as wide, so that half of one is square.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from itertools import groupby

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from rich.color import Color, ColorSystem
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

__all__ = ["RGB", "bounded", "braille", "dithered_256", "fit", "half_blocks", "shades", "shrunk"]

RGB = NDArray[np.uint8]
Float32 = NDArray[np.float32]

LONGEST = 640
"""Pixels of a side from which all sizes in cells, and in pixels of a terminal, are scaled."""
UPPER, FULL = "▀", " "
SHADES = " ░▒▓█"
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bits of a braille cell's dots, by row and column (Unicode 15, block 2800)."""


def fit(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of the largest raster of that shape in a space, at least 1x1. All in pixels."""
    scale = min(width / size[0], height / size[1])
    return tuple(
        min(max(1, math.floor(s * scale + 0.5)), max(1, most)) for s, most in zip(size, (width, height), strict=True)
    )  # type: ignore[return-value]


def shrunk(pixels: RGB, size: tuple[int, int]) -> RGB:
    """The picture at another (width, height): averaged where it gets smaller, its pixels repeated where it grows."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    grows = size[0] >= width and size[1] >= height
    how = PIL.Image.Resampling.NEAREST if grows else PIL.Image.Resampling.BOX
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, how, reducing_gap=None if grows else 3.0))


def bounded(pixels: RGB) -> RGB:
    """The picture with no side over LONGEST, to be kept and scaled from."""
    height, width = pixels.shape[:2]
    if max(width, height) <= LONGEST:
        return pixels
    return shrunk(pixels, fit((width, height), LONGEST, LONGEST))


def half_blocks(pixels: RGB) -> list[Strip]:
    """Two pixels a cell, one above the other; of an odd height the last row has its lower half left as it is behind."""
    packed = _packed(pixels)
    rows = len(packed)
    return [_line(packed[y], packed[y + 1] if y + 1 < rows else None) for y in range(0, rows, 2)]


def braille(lit: NDArray[np.bool_]) -> list[Strip]:
    """Two dots beside and four above each other a cell. ``lit``: (height, width), filled up with dark dots."""
    height, width = lit.shape
    dots = np.pad(lit, ((0, -height % 4), (0, -width % 2)))
    cells = dots.reshape(dots.shape[0] // 4, 4, dots.shape[1] // 2, 2)
    codes = np.einsum("rycx,yx->rc", cells.astype(np.int64), DOTS)
    lines = ("".join(chr(0x2800 + code) if code else " " for code in row) for row in codes.tolist())
    return [Strip([Segment(line)], len(line)) for line in lines]


def shades(values: Float32) -> list[Strip]:
    """A cell for each value of 0..1, (rows, columns): from nothing to a full block."""
    steps = np.clip((values * len(SHADES)).astype(int), 0, len(SHADES) - 1)
    lines = ("".join(SHADES[step] for step in row) for row in steps.tolist())
    return [Strip([Segment(line)], len(line)) for line in lines]


def dithered_256(pixels: RGB) -> RGB:
    """The picture in colours that a terminal of 256 has, errors spread (Floyd and Steinberg)."""
    exact = PIL.Image.fromarray(pixels).quantize(palette=_palette(), dither=PIL.Image.Dither.FLOYDSTEINBERG)
    return np.asarray(exact.convert("RGB"))


def _packed(pixels: RGB) -> list[list[int]]:
    wide = pixels.astype(np.uint32)
    packed: list[list[int]] = (wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]).tolist()
    return packed


def _line(upper: list[int], lower: list[int] | None) -> Strip:
    cells = zip(upper, [-1] * len(upper) if lower is None else lower, strict=True)
    segments = []
    for (above, below), run in groupby(cells):
        text = FULL if above == below else UPPER
        segments.append(Segment(text * sum(1 for _ in run), _style(above, below)))
    return Strip(segments, len(upper))


@lru_cache(1 << 14)
def _style(above: int, below: int) -> Style:
    return Style(color=_colour(above), bgcolor=None if below < 0 else _colour(below))


@lru_cache(1 << 14)
def _colour(packed: int) -> Color:
    return Color.from_rgb(packed >> 16, packed >> 8 & 255, packed & 255)


@cache
def _palette() -> PIL.Image.Image:
    """Of the 240 fixed colours those that Rich, which writes the numbers, gives back as they are."""
    fixed = [Color.from_ansi(n).get_truecolor() for n in range(16, 256)]
    shown = [c for c in fixed if Color.from_triplet(c).downgrade(ColorSystem.EIGHT_BIT).get_truecolor() == c]
    palette = PIL.Image.new("P", (1, 1))
    palette.putpalette([channel for colour in shown for channel in colour])
    return palette
