"""The lines below a picture: which one it is, which view of it is shown, and what the colours mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len, set_cell_size
from textual import events
from textual.color import Color
from textual.content import Content
from textual.message import Message
from textual.style import Style
from textual.widgets import Static

from localvlm.heatmap import heat_colours

from ..picture import View

__all__ = ["PictureCaption"]

RAMP_COLUMNS = 6
WIDE = 40
"""Columns from which on the colours are explained."""


class PictureCaption(Static):
    """Two lines; a click on the name of a view asks for it."""

    DEFAULT_CSS = """
    PictureCaption { width: 1fr; height: auto; }
    """

    class Chosen(Message):
        """``view``: that was clicked."""

        def __init__(self, view: View) -> None:
            super().__init__()
            self.view = view

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(markup=False, id=id)
        self._views: Sequence[View] = ()

    def tell(self, name: str, place: str, views: Sequence[View], view: View, *, coloured: bool = True) -> None:
        """What is shown.

        Args:
            name: of the picture, fit for one line.
            place: such as "2 of 3"; "" for the only picture.
            views: that there are.
            view: that is shown.
            coloured: whether the terminal shows colours.
        """
        width, self._views = self.size.width, views
        aside = f" ◂ {place} ▸" if place else ""
        lines = [Content.assemble(_cut(name, max(1, width - cell_len(aside))), (aside, "$text-muted"))]
        if len(views) > 1:
            tabs = [Content.styled(f" {v} ", "reverse bold" if v is view else "$text-muted") for v in views]
            explained = view is View.HEAT and coloured and width >= WIDE
            lines.append(Content("").join([*tabs, _legend(width - sum(map(len, tabs))) if explained else Content("")]))
        self.update(Content("\n").join(lines))

    def on_click(self, event: events.Click) -> None:
        event.stop()
        at = 0
        for view in self._views if event.y == 1 else ():
            at += len(view) + 2
            if event.x < at:
                self.post_message(self.Chosen(view))
                return


def _legend(room: int) -> Content:
    """Little to much, at the right."""
    shares = np.linspace(0, 1, RAMP_COLUMNS, dtype=np.float32)
    colours = [Color(int(r), int(g), int(b)) for r, g, b in heat_colours(shares).round()]
    ramp = [Content.styled("█", Style(foreground=colour)) for colour in colours]
    legend = Content("").join([Content.styled("little ", "$text-muted"), *ramp, Content.styled(" much", "$text-muted")])
    return Content(" " * max(1, room - legend.cell_length)) + legend


def _cut(text: str, columns: int) -> str:
    """The end of a text that is too long for its columns: the file's name rather than its folders."""
    if cell_len(text) <= columns:
        return text
    while text and cell_len(text) > columns - 1:
        text = text[1:]
    return set_cell_size(f"…{text}", columns)
