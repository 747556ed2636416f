"""The pictures of the panel, one at a time: as they are, under the guide's attention, or with kept tokens alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from localvlm.errors import UsageError

from ..picture import Colours, Drawing, Inks, Protocol, View, protocol_of
from .graphics import Graphics

__all__ = ["PictureView"]

LEAST_ROWS, HIGHEST = 4, 0.5
"""Rows of a picture: at least, and as a share of the screen at most."""


class PictureView(Widget, can_focus=True):
    """One of several drawings, in the middle, as large as fits."""

    DEFAULT_CSS = """
    PictureView {
        width: 1fr;
        height: auto;
        border-left: blank;
        padding-right: 1;
        &:focus { border-left: outer $border; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "view", "heat map"),
        Binding("left", "step(-1)", "picture before", show=False),
        Binding("right", "step(1)", "next picture", show=False),
    ]

    class Changed(Message):
        """Another picture, or another view of it, is shown."""

    index: reactive[int] = reactive(0, layout=True)
    view: reactive[View] = reactive(View.HEAT)

    def __init__(self, protocol: Protocol | None = None, *, id: str | None = None) -> None:  # noqa: A002
        """``protocol``: how pictures reach the terminal; None: as the environment tells."""
        super().__init__(id=id)
        self._protocol = _protocol() if protocol is None else protocol
        self._graphics = Graphics(self, self._protocol, self._encoded)
        self._drawings: list[Drawing] = []
        self._strips: list[Strip] | None = None
        self._drawn = 0
        """How often anything has changed."""

    @property
    def drawings(self) -> Sequence[Drawing]:
        """All pictures."""
        return self._drawings

    def show(self, drawings: Sequence[Drawing]) -> None:
        """Other pictures, the last of them first: it is the one that was added."""
        self._drawings = list(drawings)
        self.index = max(0, len(drawings) - 1)
        self.redraw(layout=True)

    def redraw(self, *, layout: bool = False) -> None:
        """After a drawing has changed."""
        self._strips, self._drawn = None, self._drawn + 1
        self.refresh(layout=layout)

    def action_view(self) -> None:
        """Shows the next view."""
        views = list(View)
        self.view = views[(views.index(self.view) + 1) % len(views)]

    def action_step(self, by: int) -> None:
        """Shows the picture before or after, the first after the last."""
        if self._drawings:
            self.index = (self.index + by) % len(self._drawings)

    def watch_index(self) -> None:
        self.redraw()
        self.post_message(self.Changed())

    def watch_view(self) -> None:
        self.redraw()
        self.post_message(self.Changed())

    def on_resize(self) -> None:
        self.redraw()

    def on_unmount(self) -> None:
        self._graphics.forget()

    def on_click(self, event: events.Click) -> None:
        event.stop()
        self.action_view()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips, self._drawn = None, self._drawn + 1

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        if not self._drawings or self._protocol is Protocol.NONE:
            return 1
        return self._drawings[self.index].size(max(1, width), max(LEAST_ROWS, int(viewport.height * HIGHEST)))[1]

    def render_lines(self, crop: Region) -> list[Strip]:
        lines = super().render_lines(crop)
        if self._strips and self._protocol is Protocol.SIXEL:
            self.call_after_refresh(self._painted)
        return lines

    def render_line(self, y: int) -> Strip:
        if self._strips is None:
            self._strips = list(self._cells())
        width = self.size.width
        strip = self._strips[y] if 0 <= y < len(self._strips) else Strip([])
        left = (width - strip.cell_length) // 2
        return strip.crop_pad(strip.cell_length, left, width - strip.cell_length - left, self.rich_style)

    @property
    def _colours(self) -> Colours:
        if self.app.no_color:
            return Colours.NONE
        return {"256": Colours.PALETTE, "standard": Colours.NONE}.get(self.app.console.color_system or "", Colours.ALL)

    def _cells(self) -> Iterable[Strip]:
        width, height = self.size
        if not self._drawings or not width or not height or self._protocol is Protocol.NONE:
            return ()
        drawing, colours = self._drawings[self.index], self._colours
        background, foreground = self.colors[2:]
        inks = Inks(background.rgb, foreground.rgb)
        if colours is Colours.ALL or (self._protocol is Protocol.SIXEL and not self.app.no_color):
            cells = drawing.size(width, height)
            self._graphics.want((self._drawn, cells), drawing, self.view, inks, cells)
            if (placed := self._graphics.strips(cells)) is not None:
                return [strip.apply_style(self.rich_style) for strip in placed]  # behind what leaves cells free
        strips = drawing.strips(width, height, self.view, inks, colours)
        if colours is Colours.NONE:
            return [strip.apply_style(self.rich_style) for strip in strips]
        return [*strips[:-1], strips[-1].apply_style(self.rich_style)]  # its lower halves may be the background

    def _encoded(self) -> None:
        """The terminal can show the picture itself."""
        self._strips = None
        self.refresh()

    def _painted(self) -> None:
        if self._strips:
            columns, rows = self._strips[0].cell_length, len(self._strips)
            x, y, width, _ = self.content_region
            self._graphics.painted(x + (width - columns) // 2, y, (columns, rows))


def _protocol() -> Protocol:
    """By the environment; a setting that says nothing known is refused where the chat begins, and is none here."""
    try:
        return protocol_of(os.environ)
    except UsageError:
        return Protocol.BLOCKS
