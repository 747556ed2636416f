"""Colours and maths of what is drawn over a picture: attention from little to much, and which token lies where.

One home for the sheet of ``--explain`` and the panel of the chat. Knows arrays: no pictures' files, no terminals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GUIDE_BAR",
    "MODEL_BAR",
    "OTHER_BAR",
    "RAMP",
    "STAGE_BARS",
    "covered",
    "heat_colours",
    "heat_shares",
    "owners",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

RAMP = np.array([[0, 32, 76], [87, 93, 109], [166, 157, 117], [255, 233, 69]], np.float32)
"""From little to much attention: dark blue to light yellow, which differ in brightness too (the ends of cividis)."""
GUIDE_BAR, MODEL_BAR, OTHER_BAR = (230, 159, 0), (0, 114, 178), (150, 150, 150)
"""Orange and blue of Okabe and Ito's palette, told apart by all common kinds of colour blindness."""
STAGE_BARS = {
    "load": ("loading", OTHER_BAR),
    "guide_encode": ("guide looks", GUIDE_BAR),
    "guide_prefill": ("guide reads", GUIDE_BAR),
    "guide_decode": ("guide answers", GUIDE_BAR),
    "encode": ("model looks", MODEL_BAR),
    "prefill": ("model reads", MODEL_BAR),
    "decode": ("model answers", MODEL_BAR),
}
"""What each stage of an answer is called, and the colour of its bar."""


def heat_shares(scores: Float32, peak: float = 0.0) -> Float32:
    """Scores as 0..1 of ``peak`` (their highest, if that is more); square roots of it, which tell small ones apart."""
    return np.asarray(np.sqrt(np.clip(scores / max(peak, float(scores.max(initial=0)), 1e-30), 0, 1)), np.float32)


def heat_colours(shares: Float32) -> Float32:
    """(..., 3) colours of RAMP, 0..255, for shares (...,) of 0..1."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(shares, stops, RAMP[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def owners(shape: tuple[int, int], boxes: Float32, chosen: Int32) -> Int32:
    """(height, width) of ``shape``: the smallest of the ``chosen`` boxes at each pixel, -1 where there is none.

    ``boxes``: (n, 4) x0, y0, x1, y1 in pixels; a box has the pixels whose centres it holds.
    """
    owner = np.full(shape, -1, np.int32)
    if not len(chosen):
        return owner
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = chosen[np.argsort(-area[chosen], kind="stable")]
    for i, (x0, y0, x1, y1) in zip(order.tolist(), _pixels(boxes[order], shape).tolist(), strict=True):
        owner[y0:y1, x0:x1] = i
    return owner


def covered(shape: tuple[int, int], boxes: Float32) -> NDArray[np.bool_]:
    """(height, width) of ``shape``: whether any of the boxes, (n, 4) as for :func:`owners`, holds the pixel."""
    x0, y0, x1, y1 = _pixels(boxes, shape).T
    there = (x1 > x0) & (y1 > y0)
    x0, y0, x1, y1 = x0[there], y0[there], x1[there], y1[there]
    steps = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
    for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(steps, (y, x), sign)
    return np.asarray(steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0)


def _pixels(boxes: Float32, shape: tuple[int, int]) -> Int32:
    """(n, 4) first and last+1 pixel of boxes."""
    most = np.array([shape[1], shape[0]] * 2)
    return np.asarray(np.clip(np.ceil(boxes.astype(np.float64) - 0.5), 0, most), np.int32)
