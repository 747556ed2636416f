"""Pictures as sixels: bands of six rows, a colour at a time."""

from __future__ import annotations

import re

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from .cells import RGB

__all__ = ["COLOURS", "sixels"]

COLOURS = 128
"""Registers that are used: half of what terminals commonly have, since more make a frame slow to write."""
_RUNS = re.compile(r"(.)\1{3,}")
"""Equal sixels that are counted rather than repeated."""


def sixels(pixels: RGB) -> str:
    """The control sequence that draws a picture where the cursor is."""
    height, width = pixels.shape[:2]
    indexed = PIL.Image.fromarray(pixels).quantize(COLOURS, dither=PIL.Image.Dither.NONE)
    colours = np.array(indexed.getpalette("RGB") or [0, 0, 0], np.int64).reshape(-1, 3)
    index = np.asarray(indexed)
    used = np.unique(index)
    parts = [f'\x1bP9;1q"1;1;{width};{height}']
    parts += [f"#{i};2;{';'.join(str(round(c * 100 / 255)) for c in colours[i].tolist())}" for i in used.tolist()]
    for top in range(0, height, 6):
        parts.append(_band(index[top : top + 6]) + "-")
    return "".join(parts) + "\x1b\\"


def _band(rows: NDArray[np.uint8]) -> str:
    """Up to six rows of colour numbers."""
    colours = np.unique(rows)
    bits = (1 << np.arange(len(rows), dtype=np.uint8))[:, None]
    codes = ((rows == colours[:, None, None]) * bits).sum(axis=1, dtype=np.uint8) + np.uint8(63)
    lines = (codes[i].tobytes().decode("ascii").rstrip("?") for i in range(len(colours)))
    return "$".join(
        f"#{colour}{_RUNS.sub(_counted, line)}" for colour, line in zip(colours.tolist(), lines, strict=True)
    )


def _counted(run: re.Match[str]) -> str:
    return f"!{len(run[0])}{run[1]}"
