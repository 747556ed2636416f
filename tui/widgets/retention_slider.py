"""How much of the pictures the model sees: a slider from 1 % to all."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import clamp
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

__all__ = ["RetentionSlider"]

LEAST, MOST = 1, 100
LABEL = "keep  100 % "
BEFORE, AFTER, THUMB = "━", "─", "●"


class RetentionSlider(Widget, can_focus=True):
    """Percent of the image tokens. Arrows step by one, with shift by ten; digits say the number."""

    DEFAULT_CSS = """
    RetentionSlider {
        width: 1fr;
        height: 1;
        border-left: blank;
        padding-right: 1;
        & > .slider--before { color: $primary; }
        & > .slider--thumb { color: $text-primary; text-style: bold; }
        & > .slider--after { color: $foreground 40%; }
        &:focus { border-left: outer $border; background: $foreground 10%; }
    }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"slider--before", "slider--thumb", "slider--after"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,minus", "by(-1)", "keep less"),
        Binding("right,plus", "by(1)", "keep more"),
        Binding("shift+left", "by(-10)", "10 % less", show=False),
        Binding("shift+right", "by(10)", "10 % more", show=False),
        Binding("home", f"to({LEAST})", "least", show=False),
        Binding("end", f"to({MOST})", "all", show=False),
    ]

    class Changed(Message):
        """``percent`` 1..100, chosen by a person."""

        def __init__(self, percent: int) -> None:
            super().__init__()
            self.percent = percent

    percent: reactive[int] = reactive(35)

    def __init__(self, percent: int = 35, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._typed = 0
        self.set_reactive(RetentionSlider.percent, percent)

    def validate_percent(self, percent: int) -> int:
        return clamp(percent, LEAST, MOST)

    def choose(self, percent: int) -> None:
        """Sets it as a person does, and tells."""
        before = self.percent
        self.percent = percent
        if self.percent != before:
            self.post_message(self.Changed(self.percent))

    def action_by(self, step: int) -> None:
        """Moves by so many percent."""
        self.choose(self.percent + step)

    def action_to(self, percent: int) -> None:
        """Moves to that percent."""
        self.choose(percent)

    def on_key(self, event: events.Key) -> None:
        digit = event.character if event.character and event.character in "0123456789" else ""
        if not digit:
            self._typed = 0
            return
        event.stop()
        joined = self._typed * 10 + int(digit)
        self._typed = joined if joined <= MOST else int(digit)
        if self._typed:
            self.choose(self._typed)

    def on_blur(self) -> None:
        self._typed = 0

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self.capture_mouse()
        self._point(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self.app.mouse_captured is self:
            self._point(event)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        event.stop()
        self.release_mouse()

    def render_line(self, y: int) -> Strip:
        width, base = self.size.width, self.rich_style
        if y:
            return Strip.blank(width, base)
        at = round((self.percent - LEAST) / (MOST - LEAST) * (self._track - 1))
        before, thumb, after = (self.get_component_rich_style(f"slider--{p}") for p in ("before", "thumb", "after"))
        line = [
            Segment(f"keep  {self.percent:>3} % ", base),
            Segment(BEFORE * at, before),
            Segment(THUMB, thumb),
            Segment(AFTER * (self._track - 1 - at), after),
        ]
        return Strip(line).adjust_cell_length(width, base)

    @property
    def _track(self) -> int:
        """Columns that the thumb moves over."""
        return max(2, self.size.width - len(LABEL))

    def _point(self, event: events.MouseEvent) -> None:
        event.stop()
        self.choose(LEAST + round((event.x - len(LABEL)) / (self._track - 1) * (MOST - LEAST)))
