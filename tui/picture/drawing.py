"""One picture with what is known of it, drawn for a number of cells."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from textual.strip import Strip

from .cells import RGB, braille, dithered_256, fit, half_blocks, shades, shrunk
from .overlay import Cover, Inks, View, cover, kept_share, painted

__all__ = ["Colours", "Drawing"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

SIZES = 2
"""At which a picture is remembered: that of its half blocks and that of its pixels in the terminal."""
LEAST_OUTLINED = 2.5
"""Pixels of a token's shorter side from which on kept ones are outlined; around smaller ones lines hide others."""
FAINTEST = 0.25
"""Shade of the least heat where there are no colours, so that it differs from what was dropped."""


class Colours(StrEnum):
    """What a terminal can show."""

    ALL = "all"
    PALETTE = "256"
    NONE = "none"


class Drawing:
    """A picture, where its image tokens lie, how much each was looked at and which were kept.

    Attributes:
        pixels: (height, width, 3), of a size that is quickly scaled.
        kept: indices of the tokens kept; None: not known.
    """

    def __init__(self, pixels: RGB) -> None:
        self.pixels = pixels
        self.kept: Int32 | None = None
        self._boxes = np.zeros((0, 4), np.float32)
        self._heat: Float32 | None = None
        self._scaled: dict[tuple[int, int], RGB] = {}
        self._covered: dict[tuple[int, int], Cover] = {}

    @property
    def has_heat(self) -> bool:
        """Whether it is known where the guide looked."""
        return self._heat is not None

    def know(self, boxes: Float32 | None, heat: Float32 | None, kept: Int32 | None) -> bool:
        """What a look or an answer told; whether that is other than what was known.

        Args:
            boxes: (n, 4) x0, y0, x1, y1 of the image tokens as shares of the picture's width and height; None: where
                they lie is not known, and nothing is drawn over the picture.
            heat: (n,) of each, 0..1.
            kept: indices of those that were kept.
        """
        if boxes is None:
            boxes, heat, kept = np.zeros((0, 4), np.float32), None, None
        placed = np.array_equal(boxes, self._boxes) and _same(heat, self._heat)
        if placed and _same(kept, self.kept):
            return False
        self._boxes, self._heat, self.kept = boxes, heat, kept
        if not placed:
            self._covered = {}
        return True

    def size(self, columns: int, rows: int) -> tuple[int, int]:
        """(columns, rows) of cells that the picture takes where there are that many."""
        height, width = self.pixels.shape[:2]
        across, down = fit((width, height), columns, 2 * rows)
        return across, (down + 1) // 2

    def frame(self, size: tuple[int, int], view: View, inks: Inks = Inks()) -> RGB:
        """(height, width, 3) what ``view`` shows, at ``size``, (width, height) in pixels."""
        outlined = self._least_side(size) >= LEAST_OUTLINED
        return painted(self._at(size), view, self._heat_at(size), self._kept_at(size), inks, outlined=outlined)

    def strips(
        self, columns: int, rows: int, view: View, inks: Inks = Inks(), colours: Colours = Colours.ALL
    ) -> list[Strip]:
        """The picture in as many cells as :meth:`size` says."""
        if colours is Colours.NONE:
            return self._without_colours(columns, rows, view, inks.dark)
        height, width = self.pixels.shape[:2]
        frame = self.frame(fit((width, height), columns, 2 * rows), view, inks)
        return half_blocks(dithered_256(frame) if colours is Colours.PALETTE else frame)

    def _without_colours(self, columns: int, rows: int, view: View, on_dark: bool) -> list[Strip]:
        columns, rows = self.size(columns, rows)
        kept = None if view is View.PICTURE else self._kept_at((columns, rows))
        heat = self._heat_at((columns, rows))
        if view is View.HEAT and heat is not None:
            shown = heat.there if kept is None else np.minimum(kept, heat.there)
            return shades(np.where(shown >= 0.5, np.maximum(heat.heat, FAINTEST), 0))
        size = 2 * columns, 4 * rows
        grey = PIL.Image.fromarray(self._at(size)).convert("L")
        lit = np.asarray(grey.convert("1")) == on_dark
        shares = None if view is View.PICTURE else self._kept_at(size)
        return braille(lit if shares is None else lit & (shares >= 0.5))

    def _least_side(self, size: tuple[int, int]) -> float:
        """Of the tokens kept, in pixels."""
        if self.kept is None or not len(self.kept):
            return 0.0
        boxes = self._boxes[self.kept]
        sides = (boxes[:, 2:] - boxes[:, :2]) * np.array(size, np.float32)
        return float(np.median(sides.min(axis=1)))

    def _at(self, size: tuple[int, int]) -> RGB:
        found = self._scaled.get(size)
        if found is None:
            found = shrunk(self.pixels, size)
            self._scaled = {**dict(list(self._scaled.items())[1 - SIZES :]), size: found}
        return found

    def _heat_at(self, size: tuple[int, int]) -> Cover | None:
        if self._heat is None:
            return None
        found = self._covered.get(size)
        if found is None:
            found = cover(size[::-1], self._boxes, self._heat)
            self._covered = {**dict(list(self._covered.items())[1 - SIZES :]), size: found}
        return found

    def _kept_at(self, size: tuple[int, int]) -> Float32 | None:
        return None if self.kept is None else kept_share(size[::-1], self._boxes, self.kept)


def _same(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
