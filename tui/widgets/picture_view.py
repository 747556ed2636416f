"""The pictures of the panel, one at a time: as they are, under the guide's attention, or with kept tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from ..picture import Colours, Drawing, Inks, View

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

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._drawings: list[Drawing] = []
        self._strips: list[Strip] | None = None

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
        self._strips = None
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

    def on_click(self, event: events.Click) -> None:
        event.stop()
        self.action_view()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips = None

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        if not self._drawings:
            return LEAST_ROWS
        most = max(LEAST_ROWS, int(viewport.height * HIGHEST))
        return max(self._drawings[self.index].size(max(1, width), most)[1], 1)

    def render_line(self, y: int) -> Strip:
        width, height = self.size
        if self._strips is None:
            self._strips = self._drawn(width, height)
        if not 0 <= y < len(self._strips):
            return Strip.blank(width, self.rich_style)
        strip = self._strips[y].apply_style(self.rich_style) if self._colours is Colours.NONE else self._strips[y]
        left = (width - strip.cell_length) // 2
        return strip.crop_pad(strip.cell_length, left, width - strip.cell_length - left, self.rich_style)

    @property
    def _colours(self) -> Colours:
        if self.app.no_color:
            return Colours.NONE
        return {"256": Colours.PALETTE, "standard": Colours.NONE}.get(self.app.console.color_system or "", Colours.ALL)

    def _drawn(self, width: int, height: int) -> list[Strip]:
        if not self._drawings or not width or not height:
            return []
        background, foreground = self.colors[2:4]
        inks = Inks(background.rgb, foreground.rgb)
        return self._drawings[self.index].strips(width, height, self.view, inks, self._colours)
