"""Markdown that grows, as lines of a terminal: only what may still change is laid out anew. Knows no widgets."""

from __future__ import annotations

import io
from collections.abc import Mapping

from markdown_it import MarkdownIt
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, Markdown, MarkdownElement, TableElement
from rich.padding import Padding
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip

__all__ = ["STYLES", "AnswerLines", "parser"]

LEAST = 8
"""Columns; where there are fewer, lines are cut."""
STYLES = ("code", "code_block", "h1", "h2", "h3", "h4", "h5", "h6", "block_quote", "item.bullet", "item.number", "hr",
          "table.border", "table.header")  # fmt: skip
"""What has a style of its own beside emphasis."""


def parser() -> MarkdownIt:
    """CommonMark with tables. What would fetch, open or disguise something stays the text it is: links, pictures, HTML,
    and references to characters by number, which would be read after the text was made safe.
    """
    rules = ["link", "image", "autolink", "html_inline", "html_block", "entity", "reference"]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable(rules)


_PARSER = parser()


class _Code(CodeBlock):
    """Without colours of its own: those of themes for code cannot be read on every ground."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        style = console.get_style("markdown.code_block")
        yield Padding(Text(str(self.text).rstrip()), (0, 1), style=style)


class _Heading(Heading):
    LEVEL_ALIGN = {}  # all on the left


class _Rule(HorizontalRule):
    new_line = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style=console.get_style("markdown.hr"))


class _Table(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, style=console.get_style("markdown.table.border")
        )
        for cell in self.header.row.cells if self.header and self.header.row else ():
            heading = cell.content.copy()
            heading.stylize(console.get_style("markdown.table.header"))
            table.add_column(heading, justify=cell.justify, overflow="fold")
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


class _Markdown(Markdown):
    elements: dict[str, type[MarkdownElement]] = {  # type: ignore[misc]
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
        "hr": _Rule,
        "table_open": _Table,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)


class AnswerLines:
    """A text that only grows, and its lines.

    Attributes:
        source: the text.
    """

    def __init__(self) -> None:
        self.source = ""
        self._settled: list[str] = []
        """Blocks that later text cannot change; what follows them is the tail."""
        self._start = 0
        self._laid: list[Strip] = []
        self._n_laid = 0
        self._tail: list[Strip] | None = None
        self._console = Console(file=io.StringIO())
        self._like: tuple[int, dict[str, Style]] = (0, {})

    def feed(self, text: str) -> None:
        """The next piece."""
        self.source += text
        self._tail = None
        tail = self.source[self._start :]
        whole = tail[: tail.rfind("\n") + 1]  # what an unfinished line will be, the rest of it tells
        starts = [token.map[0] for token in _PARSER.parse(whole) if not token.level and token.map]
        if len(starts) > 1:
            end = sum(len(line) + 1 for line in whole.split("\n")[: starts[-1]])
            self._settled.append(tail[:end])
            self._start += end

    def lines(self, width: int, styles: Mapping[str, Style]) -> list[Strip]:
        """All of it, ``width`` columns wide, in ``styles`` by STYLES."""
        like = (max(LEAST, width), dict(styles))
        if like != self._like:
            self._like, self._laid, self._n_laid, self._tail = like, [], 0, None
            theme = Theme({f"markdown.{name}": style for name, style in styles.items()})
            self._console = Console(
                file=io.StringIO(),
                width=like[0],
                force_terminal=True,
                color_system="truecolor",
                theme=theme,
                _environ={},
            )
        for block in self._settled[self._n_laid :]:
            self._laid += self._lines_of(block, more=True)
        self._n_laid = len(self._settled)
        if self._tail is None:
            self._tail = self._lines_of(self.source[self._start :])
        if self._tail:
            return self._laid + self._tail
        return self._laid[:-1]  # nothing comes after the last blank line

    def _lines_of(self, text: str, *, more: bool = False) -> list[Strip]:
        rendered = self._console.render_lines(_Markdown(text), pad=False)
        strips = [Strip([segment for segment in line if not segment.control]) for line in rendered]
        filled = [i for i, strip in enumerate(strips) if strip.text.strip()]
        if not filled:
            return []
        return strips[filled[0] : filled[-1] + 1] + [Strip.blank(0)] * more
