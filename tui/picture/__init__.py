"""Pictures in a terminal: pixels to cells, and what is drawn over them. Knows no widgets."""

from __future__ import annotations

from .cells import RGB, bounded, braille, dithered_256, fit, half_blocks, shades, shrunk
from .drawing import Colours, Drawing
from .overlay import Cover, Inks, View, cover, kept_share, painted

__all__ = [
    "RGB",
    "Colours",
    "Cover",
    "Drawing",
    "Inks",
    "View",
    "bounded",
    "braille",
    "cover",
    "dithered_256",
    "fit",
    "half_blocks",
    "kept_share",
    "painted",
    "shades",
    "shrunk",
]
