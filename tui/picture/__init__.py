"""Pictures in a terminal: pixels to cells, and what is drawn over them. Knows no widgets."""

from __future__ import annotations

from localvlm.terminal_pictures import VARIABLE, Protocol, cell_pixels, protocol_of

from .cells import RGB, bounded, braille, dithered_256, fit, half_blocks, shades, shrunk
from .drawing import Colours, Drawing
from .kitty import MOST_CELLS, forgotten, placeholders, sent
from .overlay import Cover, Inks, View, cover, kept_share, painted
from .sixel import sixels

__all__ = [
    "MOST_CELLS",
    "RGB",
    "VARIABLE",
    "Colours",
    "Cover",
    "Drawing",
    "Inks",
    "Protocol",
    "View",
    "bounded",
    "braille",
    "cell_pixels",
    "cover",
    "dithered_256",
    "fit",
    "forgotten",
    "half_blocks",
    "kept_share",
    "painted",
    "placeholders",
    "protocol_of",
    "sent",
    "shades",
    "shrunk",
    "sixels",
]
