"""Text of a widget that changes several times a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual.content import Content
from textual.widgets import Static

if TYPE_CHECKING:
    from textual.css.styles import RulesMap

__all__ = ["rewrite"]


def rewrite(line: Static, content: Content) -> None:
    """Writes other text into a widget that is as wide as it may be. A screen is laid out anew, which takes some tens of
    milliseconds in which no key is read, only where the text takes another number of lines.
    """
    width, rules = line.content_size.width, cast("RulesMap", line.styles)  # as Textual itself passes them
    same = width > 0 and line.visual.get_height(rules, width) == content.get_height(rules, width)
    line.update(content, layout=not same)
