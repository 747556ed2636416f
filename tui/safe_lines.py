"""The last thing before the terminal: no line of any widget, whoever made it, holds a character that drives it."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from localvlm.sanitize import without_controls

__all__ = ["SafeLines"]


class SafeLines(LineFilter):
    """Takes control characters out of text that is about to be shown. They have no width, so that nothing moves.

    Widgets make text safe as a whole before, so that no remains of sequences are seen. This holds where one forgot.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002
        """The segments, with text alone in them."""
        return [
            segment if control is not None or (safe := without_controls(text)) is text else Segment(safe, style)
            for segment in segments
            for text, style, control in (segment,)
        ]
