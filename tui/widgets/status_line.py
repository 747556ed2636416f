"""One line at the bottom: the pair, what it does or did, and the keys that lead further."""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from ..keymap import key_of
from ..text import one_line

__all__ = ["StatusLine"]

HINTS = (("help", "help"), ("palette", "palette"), ("open-image", "picture"))
"""Actions of the keymap and what they are called, the most important first."""


class StatusLine(Widget):
    """What stands on its left is told by the app; what does not fit is left out, the hints first."""

    DEFAULT_CSS = """
    StatusLine { height: 1; padding: 0 1; background: $panel; color: $text-muted; }
    """

    def __init__(self, pair: str, *, private: bool = False, keymap: Mapping[str, str] = {}) -> None:
        super().__init__()
        self._pair, self._private, self._state = pair, private, Content("")
        self._hints = [f"{key_of(name, keymap, short=True)} {what}" for name, what in HINTS]

    @property
    def pair(self) -> str:
        """The name of the pair that is told."""
        return self._pair

    @property
    def told(self) -> str:
        """What it says, as plain text."""
        return self._left().plain

    def tell(self, state: str | Content | None = None, *, pair: str | None = None, private: bool | None = None) -> None:
        """Changes what is said; None: as it was."""
        if state is not None:
            self._state = Content(one_line(state)) if isinstance(state, str) else state
        self._pair = self._pair if pair is None else pair
        self._private = self._private if private is None else private
        self.refresh()

    def _left(self) -> Content:
        parts = [Content.styled(one_line(self._pair, 40), "bold $foreground")]
        parts += [Content.styled("private", "bold $text-warning")] * self._private
        parts += [self._state] if self._state.plain else []
        return Content(" \u00b7 ").join(parts)

    def render(self) -> Content:
        """Left and right, as wide as there is room."""
        left, width = self._left(), self.content_size.width
        room, hints = width - left.cell_length, list(self._hints)
        while hints and len("   ".join(hints)) + 2 > room:
            hints.pop()
        right = "   ".join(hints)
        gap = " " * max(0, room - len(right))
        return Content.assemble(left, gap, right) if room > 0 else left.truncate(width, ellipsis=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        return 1
