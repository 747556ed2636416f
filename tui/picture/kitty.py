"""Pictures by kitty's graphics protocol, placed by characters that stand for their cells.

The terminal is sent the pixels once under a number; cells of text then name the number, a row and a column. So a
picture scrolls, is covered and goes away as text does. https://sw.kovidgoyal.net/kitty/graphics-protocol/
"""

from __future__ import annotations

import base64
import unicodedata
import zlib

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from .cells import RGB

__all__ = ["MOST_CELLS", "forgotten", "placeholders", "sent"]

PLACEHOLDER = "\U0010eeee"
CHUNK = 4096
"""Bytes of base64 that a command carries at most."""
FUSED = (*range(0x300, 0x305), *range(0x306, 0x30D), 0x30F, 0x311, 0x313, 0x314, 0x342, 0x653, 0x654)
"""Marks that normalization makes one with their letter."""
NUMBERS = "".join(
    chr(c)
    for c in range(0x300, 0x82E)
    if unicodedata.combining(chr(c)) == 230 and not unicodedata.decomposition(chr(c)) and c not in FUSED
)
"""Marks above a letter that count rows and columns from 0 on, in the protocol's order."""
MOST_CELLS = len(NUMBERS)
"""Rows, and columns, that a picture can have."""


def sent(pixels: RGB, number: int, columns: int, rows: int, *, tmux: bool = False) -> str:
    """What makes a terminal keep a picture, to be shown in so many cells. ``number``: 1 to 2^24 - 1."""
    height, width = pixels.shape[:2]
    data = base64.standard_b64encode(zlib.compress(pixels.tobytes(), 1)).decode("ascii")
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    told = f"a=T,U=1,q=2,f=24,o=z,i={number},s={width},v={height},c={columns},r={rows},"
    commands = []
    for i, chunk in enumerate(chunks):
        more = int(i < len(chunks) - 1)
        commands.append(_command(f"{told if i == 0 else 'q=2,'}m={more}", chunk, tmux))
    return "".join(commands)


def forgotten(number: int, *, tmux: bool = False) -> str:
    """What makes a terminal forget a picture."""
    return _command(f"a=d,d=I,q=2,i={number}", "", tmux)


def placeholders(number: int, columns: int, rows: int) -> list[Strip]:
    """The cells of a picture that was sent; its number is their colour."""
    style = Style(color=Color.from_rgb(number >> 16, number >> 8 & 255, number & 255))
    return [
        Strip([Segment("".join(PLACEHOLDER + NUMBERS[y] + NUMBERS[x] for x in range(columns)), style)], columns)
        for y in range(rows)
    ]


def _command(keys: str, data: str, tmux: bool) -> str:
    command = f"\x1b_G{keys};{data}\x1b\\" if data else f"\x1b_G{keys}\x1b\\"
    if not tmux:
        return command
    return "\x1bPtmux;" + command.replace("\x1b", "\x1b\x1b") + "\x1b\\"
