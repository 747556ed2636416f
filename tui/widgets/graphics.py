"""Pixels for terminals that show them: encoded beside the app, in the place of the half blocks once they are there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Hashable
from itertools import count

import numpy as np
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Select

from ..picture import (
    MOST_CELLS,
    RGB,
    Drawing,
    Inks,
    Protocol,
    View,
    cell_pixels,
    fit,
    forgotten,
    placeholders,
    sent,
    sixels,
)

__all__ = ["Graphics"]

USUAL_CELL = (10, 20)
"""Pixels of a cell, where the system does not know: kitty scales what it gets."""
LONGEST = 800
"""Pixels of a side that kitty is sent; it scales them up."""
_numbers = count(os.getpid() % 0xFFFF * 0x100 + 1)
"""Of pictures in the terminal, from a place of this process on, since they are shared by all that runs in it."""


class Graphics:
    """Shows one frame at a time in a widget's cells. Its methods belong to the thread of the app."""

    def __init__(self, widget: Widget, protocol: Protocol, ready: Callable[[], None]) -> None:
        """``ready`` is called when there is something to show other than before."""
        self._widget, self._protocol, self._ready = widget, protocol, ready
        self._number = next(_numbers) & 0xFFFFFF
        self._key: Hashable = None
        """Of the frame that is wanted."""
        self._cells: tuple[int, int] | None = None
        """(columns, rows) of the picture that kitty has."""
        self._sixels = ""

    def strips(self, cells: tuple[int, int]) -> list[Strip] | None:
        """The cells of a picture that the terminal has in that size; None: half blocks stand for it."""
        return placeholders(self._number, *cells) if self._cells == cells else None

    def want(self, key: Hashable, drawing: Drawing, view: View, inks: Inks, cells: tuple[int, int]) -> None:
        """Another frame is to be shown, unless ``key`` is that of the last one."""
        if key == self._key or self._protocol not in (Protocol.KITTY, Protocol.SIXEL):
            return
        self._key, self._sixels = key, ""
        self._widget.run_worker(self._made(key, drawing, view, inks, cells), group="graphics", exclusive=True)

    def painted(self, x: int, y: int, cells: tuple[int, int]) -> None:
        """The cells at a place of the screen were written, and what sixels drew there is gone."""
        if self._sixels and self._free(x, y, cells):
            self._write(f"\x1b7\x1b[{y + 1};{x + 1}H{self._sixels}\x1b8")

    def forget(self) -> None:
        """The terminal need not keep the picture."""
        if self._cells is not None:
            self._write(forgotten(self._number, tmux=self._in_tmux))
        self._key, self._cells, self._sixels = None, None, ""

    async def _made(self, key: Hashable, drawing: Drawing, view: View, inks: Inks, cells: tuple[int, int]) -> None:
        cell = cell_pixels()
        if self._protocol is Protocol.SIXEL and cell is None:
            return
        across, down = cell or USUAL_CELL
        space = cells[0] * across, cells[1] * down
        if self._protocol is Protocol.KITTY:
            space = min(space[0], LONGEST), min(space[1], LONGEST)
            if max(cells) > MOST_CELLS:
                return
        encoded = await asyncio.to_thread(self._encoded, drawing, view, inks, space, cells)
        if key != self._key:
            return
        if self._protocol is Protocol.KITTY:
            self._write(encoded)
            self._cells = cells
        else:
            self._sixels = encoded
        self._ready()

    def _encoded(self, drawing: Drawing, view: View, inks: Inks, space: tuple[int, int], cells: tuple[int, int]) -> str:
        height, width = drawing.pixels.shape[:2]
        frame: RGB = drawing.frame(fit((width, height), *space), view, inks)
        if self._protocol is Protocol.SIXEL:
            return sixels(_amid(frame, space, inks.background))
        return sent(frame, self._number, *cells, tmux=self._in_tmux)

    @property
    def _in_tmux(self) -> bool:
        return bool(os.environ.get("TMUX"))

    def _free(self, x: int, y: int, cells: tuple[int, int]) -> bool:
        """Whether nothing lies over the cells, all of them are on the screen, and none is in its last row, below which
        a terminal would scroll.
        """
        widget = self._widget
        if not widget.is_attached or widget.screen is not widget.app.screen:
            return False
        seen = widget.screen.find_widget(widget).visible_region
        inside = seen.contains(x, y) and seen.contains(x + cells[0] - 1, y + cells[1] - 1)
        return (
            inside and seen.bottom < widget.app.size.height and not any(s.expanded for s in widget.screen.query(Select))
        )

    def _write(self, control: str) -> None:
        driver = self._widget.app._driver  # the only way for a sequence to come between those of the app
        if driver is not None:
            driver.write(control)


def _amid(frame: RGB, space: tuple[int, int], around: tuple[int, int, int]) -> RGB:
    """A frame in the middle of a (width, height): where cells are not twice as high as wide, half blocks that it does
    not cover would be seen beside it.
    """
    height, width = frame.shape[:2]
    left, top = (space[0] - width) // 2, (space[1] - height) // 2
    whole = np.empty((space[1], space[0], 3), np.uint8)
    whole[:] = around
    whole[top : top + height, left : left + width] = frame
    return whole
