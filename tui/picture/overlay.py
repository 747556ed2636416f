"""What is drawn over a picture: the heat of attention, and which tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from localvlm.heatmap import covered, heat_colours, owners

from .cells import RGB

__all__ = ["Cover", "Inks", "View", "cover", "kept_share", "painted"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

SAMPLES = 4
"""Places a side at which a pixel is looked up; tokens seldom end where pixels do."""
FINE = 480
"""Longest side in places: pictures drawn with more pixels need fewer a pixel."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
HEAT = 0.75
"""Share of the heat's colour, beside the grey of the picture."""
DIM, LINE = 0.75, 0.6
"""How far what was dropped fades, and how strong the line around what was kept is."""


class View(StrEnum):
    """What is shown of a picture."""

    PICTURE = "picture"
    HEAT = "heat"
    KEPT = "kept"


@dataclass(frozen=True)
class Cover:
    """Heat at each pixel: ``heat`` (height, width) float32 0..1 where there are tokens, and ``there`` (height, width)
    float32, the share of the pixel on which some lie.
    """

    heat: Float32
    there: Float32


def cover(shape: tuple[int, int], boxes: Float32, shares: Float32) -> Cover:
    """The heat of a picture drawn with (height, width) pixels; of overlapping boxes the smallest counts.

    Args:
        shape: pixels that the picture is drawn with.
        boxes: (n, 4) x0, y0, x1, y1 as shares of the picture's width and height, 0..1.
        shares: (n,) heat of each, 0..1.
    """
    fine = _fine(shape)
    owner = owners(fine, boxes * _sides(fine), np.arange(len(boxes), dtype=np.int32))
    there = _mean(owner >= 0, shape)
    summed = _mean(np.append(shares, np.float32(0))[owner], shape)
    return Cover(np.divide(summed, there, out=np.zeros_like(summed), where=there > 0), there)


def kept_share(shape: tuple[int, int], boxes: Float32, kept: Int32) -> Float32:
    """(height, width) float32: of each pixel the share on which a token lies that is kept. Arguments as in
    :func:`cover`; ``kept`` are indices of ``boxes``.
    """
    fine = _fine(shape)
    return _mean(covered(fine, boxes[kept] * _sides(fine)), shape)


@dataclass(frozen=True)
class Inks:
    """Colours of the theme, RGB of 0..255, that what is drawn over a picture fits into."""

    background: tuple[int, int, int] = (20, 23, 28)
    foreground: tuple[int, int, int] = (228, 230, 235)

    @property
    def dark(self) -> bool:
        """Whether the background is darker than what is written on it."""
        return sum(self.background) < sum(self.foreground)

    def faded(self, view: View) -> Float32:
        """What dropped tokens fade into: under heat the background; else a grey that neither black nor white is."""
        share = 0.0 if view is View.HEAT else 0.15 if self.dark else 0.45
        return np.asarray((1 - share) * np.array(self.background) + share * np.array(self.foreground), np.float32)


def painted(
    picture: RGB, view: View, heat: Cover | None, kept: Float32 | None, inks: Inks = Inks(), *, outlined: bool = False
) -> RGB:
    """The picture as ``view`` shows it, as far as heat and kept tokens are known.

    Heat lies on the picture's grey. What was dropped is grey and fades, so that in both views colour means: kept.
    ``outlined``: with a line around what is kept, on the pixels beside it.
    """
    colour = picture.astype(np.float32)
    grey = np.repeat((colour @ LUMA)[..., None], 3, axis=2)
    if view is View.HEAT and heat is not None:
        hot = _mixed(grey, heat_colours(heat.heat), np.full_like(heat.heat, HEAT))
        colour = _mixed(colour, hot, heat.there)
        grey = np.repeat((colour @ LUMA)[..., None], 3, axis=2)
    if view is not View.PICTURE and kept is not None:
        colour = _mixed(_mixed(grey, inks.faded(view), np.full_like(kept, DIM)), colour, kept)
        if outlined:
            line: Float32 = LINE * _beside(kept >= 0.5).astype(np.float32)
            colour = _mixed(colour, np.array(inks.foreground, np.float32), line)
    return np.asarray(np.rint(colour.clip(0, 255)), np.uint8)


def _beside(there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that are not there, beside, above or below one that is."""
    wide = np.pad(there, 1)
    near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return near & ~there


def _mixed(below: Float32, above: Float32, share: Float32) -> Float32:
    return np.asarray(below + (above - below) * share[..., None], np.float32)


def _fine(shape: tuple[int, int]) -> tuple[int, int]:
    samples = max(1, min(SAMPLES, FINE // max(shape)))
    return shape[0] * samples, shape[1] * samples


def _sides(shape: tuple[int, int]) -> Float32:
    return np.array([shape[1], shape[0]] * 2, np.float32)


def _mean(values: NDArray[np.generic], shape: tuple[int, int]) -> Float32:
    """Values of places as means of pixels."""
    blocks = values.reshape(shape[0], values.shape[0] // shape[0], shape[1], values.shape[1] // shape[1])
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32))
