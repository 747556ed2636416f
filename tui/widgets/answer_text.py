"""Markdown that a model wrote: shown, never followed."""

from __future__ import annotations

import asyncio
import time

from rich.style import Style
from rich.text import Text
from textual.geometry import Size
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from ..answer_lines import STYLES, AnswerLines
from ..display import Displayed
from ..yielding import pause_s

__all__ = ["AnswerText"]

PAUSE_S = 1 / 25
"""Shortest time between two updates."""
SHARE, LONGEST_S = 4, 0.2
"""An update that took so long, layout and all, is followed by a pause so many times as long, up to LONGEST_S."""


class AnswerText(Widget):
    """Takes text as it comes. Pieces that come faster than they can be shown are shown together.

    One widget, however long the answer: a key costs the same below ten blocks and below a thousand.
    """

    COMPONENT_CLASSES = {f"answer--{name.replace('.', '-').replace('_', '-')}" for name in STYLES}
    DEFAULT_CSS = """
    AnswerText {
        height: auto;
        & > .answer--code { color: $text-accent; text-style: bold; }
        & > .answer--code-block { background: $panel; }
        & > .answer--h1 { color: $text-primary; text-style: bold underline; }
        & > .answer--h2, & > .answer--h3 { color: $text-primary; text-style: bold; }
        & > .answer--h4, & > .answer--h5, & > .answer--h6 { text-style: bold; }
        & > .answer--block-quote, & > .answer--hr, & > .answer--table-border { color: $text-muted; }
        & > .answer--item-bullet, & > .answer--item-number { color: $text-accent; }
        & > .answer--table-header { text-style: bold; }
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._displayed, self._text = Displayed(), AnswerLines()
        self._styles_used: dict[str, Style] = {}
        self._pending: list[str] = []
        self._showing: asyncio.Task[None] | None = None

    @property
    def hidden(self) -> int:
        """Characters that are not shown since there are too many."""
        return self._displayed.hidden

    @property
    def source(self) -> str:
        """What is shown, as Markdown."""
        return self._text.source

    def feed(self, text: str) -> None:
        """The next piece, as the model wrote it."""
        if shown := self._displayed.feed(text):
            self._pending.append(shown)
            if self._showing is None or self._showing.done():
                self._showing = asyncio.create_task(self._show())

    async def finish(self) -> None:
        """Shows what is left at once."""
        if self._showing is not None and not self._showing.done():
            self._showing.cancel()
            await asyncio.gather(self._showing, return_exceptions=True)
        self._append()

    async def _show(self) -> None:
        while self._pending and self.is_attached:
            started = time.perf_counter()
            self._append()
            drawn = asyncio.Event()
            self.call_after_refresh(drawn.set)
            await drawn.wait()
            await asyncio.sleep(self._pause(time.perf_counter() - started))

    def _pause(self, took: float) -> float:
        """Seconds after an update that took that many."""
        typist = getattr(self.app, "typist", None)
        return max(PAUSE_S, min(SHARE * took, LONGEST_S), pause_s(took, typist))

    def _append(self) -> None:
        if self._pending:
            self._text.feed("".join(self._pending))
            self._pending.clear()
            width, height = self.content_size
            self.refresh(layout=not width or len(self._lines(width)) != height)

    # lines

    def _lines(self, width: int) -> list[Strip]:
        if not self._styles_used:
            names = {name: f"answer--{name.replace('.', '-').replace('_', '-')}" for name in STYLES}
            self._styles_used = {name: self.get_component_rich_style(c, partial=True) for name, c in names.items()}
        return self._text.lines(width, self._styles_used)

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._styles_used = {}

    def get_content_width(self, container: Size, viewport: Size) -> int:  # noqa: ARG002
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        return len(self._lines(width))

    def render_line(self, y: int) -> Strip:
        """A line of what there is, in the colours of the message, and what is selected in it."""
        width, style = self.content_size.width, self.rich_style
        lines = self._lines(width)
        if y >= len(lines):
            return Strip.blank(width, style)
        strip = lines[y]
        if self.text_selection is not None and (span := self.text_selection.get_span(y)) is not None:
            text = Text.assemble(*((segment.text, segment.style or "") for segment in strip), end="")
            start, end = span
            text.stylize(self.screen.get_component_rich_style("screen--selection"), start, None if end < 0 else end)
            strip = Strip(text.render(self.app.console))
        return strip.apply_style(style).apply_offsets(0, y).extend_cell_length(width, style)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """What is selected of it, as it is shown."""
        text = "\n".join(strip.text.rstrip() for strip in self._lines(self.content_size.width))
        return selection.extract(text), "\n"

    def selection_updated(self, selection: Selection | None) -> None:  # noqa: ARG002
        self.refresh()
