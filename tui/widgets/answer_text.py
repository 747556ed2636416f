"""Markdown that a model wrote: shown, never followed."""

from __future__ import annotations

import asyncio
import time

from markdown_it import MarkdownIt
from textual.widgets import Markdown

from ..display import Displayed

__all__ = ["AnswerText"]

PAUSE_S = 1 / 25
"""Shortest time between two updates."""
SHARE = 20
"""An update that took so long, layout and all, is followed by a pause so many times as long: whoever types meets one key
in twenty that waits for it.
"""


def parser() -> MarkdownIt:
    """CommonMark with tables. What would fetch, open or disguise something stays the text it is: links, pictures, HTML,
    and references to characters by number, which would be read after the text was made safe.
    """
    rules = ["link", "image", "autolink", "html_inline", "html_block", "entity", "reference"]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable(rules)


class AnswerText(Markdown):
    """Takes text as it comes. Pieces that come faster than they can be shown are shown together."""

    DEFAULT_CSS = """
    AnswerText {
        padding: 0;
        height: auto;
        & > MarkdownParagraph { margin: 0 0 1 0; }
        & > MarkdownBlock:last-child { margin-bottom: 0; }
        MarkdownH1, MarkdownH2 { content-align: left middle; margin: 1 0; }
    }
    """

    def __init__(self) -> None:
        super().__init__(parser_factory=parser, open_links=False)
        self._displayed = Displayed()
        self._pending: list[str] = []
        self._showing: asyncio.Task[None] | None = None

    @property
    def hidden(self) -> int:
        """Characters that are not shown since there are too many."""
        return self._displayed.hidden

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
        await self._append()

    async def _show(self) -> None:
        while self._pending and self.is_attached:
            started = time.perf_counter()
            await asyncio.shield(self._append())
            drawn = asyncio.Event()
            self.call_after_refresh(drawn.set)
            await drawn.wait()
            await asyncio.sleep(max(PAUSE_S, SHARE * (time.perf_counter() - started)))

    async def _append(self) -> None:
        text = "".join(self._pending)
        self._pending.clear()
        if text and self.is_attached:
            await self.append(text)
