"""What may be shown of what a model writes: nothing that drives a terminal, and no more than a screen can hold."""

from __future__ import annotations

import re

from localvlm.sanitize import Sanitizer

__all__ = ["MOST", "MOST_OF_LINE", "Displayed", "displayed"]

MOST = 60_000
"""Characters of an answer that are shown; the history and the clipboard get all of it."""
MOST_OF_LINE = 4_000
MOST_JOINED = 8
"""Characters without a width that may follow each other: joiners, variation selectors, combining marks."""
_JOINED = (
    "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200d\u2060-\u2064\u20d0-\u20ff"
    "\ufe00-\ufe0f\ufe20-\ufe2f\ufeff"
)
_RUN = re.compile(f"[{_JOINED}]{{{MOST_JOINED + 1},}}")
_TAIL = re.compile(f"[{_JOINED}]*\\Z")
_MARK = "\u2026"


class Displayed:
    """The part of a stream that is shown, whatever way it is cut into pieces.

    Attributes:
        hidden: characters that are not shown since there are too many.
    """

    def __init__(self) -> None:
        self._sanitizer = Sanitizer()
        self._shown = self._line = self._joined = 0
        self.hidden = 0

    def feed(self, text: str) -> str:
        """What is shown of the next piece."""
        safe = self._bounded_runs(self._sanitizer.feed(text))
        if self._shown >= MOST:
            self.hidden += len(safe)
            return ""
        out = []
        for i, line in enumerate(safe.split("\n")):
            if i:
                self._line = 0
                out.append("\n")
            out.append(self._bounded_line(line))
        whole = "".join(out)
        shown = whole[: MOST - self._shown]
        self._shown += len(shown)
        self.hidden += len(whole) - len(shown)
        return shown

    def _bounded_line(self, line: str) -> str:
        before, self._line = self._line, self._line + len(line)
        shown = line[: max(0, MOST_OF_LINE - before)]
        self.hidden += len(line) - len(shown)
        return shown + (_MARK if before <= MOST_OF_LINE < self._line else "")

    def _bounded_runs(self, text: str) -> str:
        """Long runs of characters without a width are one character to a terminal, and endless work."""
        if not text:
            return text
        begun = "\u200d" * self._joined
        joined = _RUN.sub(lambda run: run[0][:MOST_JOINED], begun + text)
        tail = _TAIL.search(joined)
        self._joined = min(len(tail[0]) if tail else 0, MOST_JOINED)
        return joined[len(begun) :]


def displayed(text: str) -> str:
    """What is shown of a whole text."""
    return Displayed().feed(text)
