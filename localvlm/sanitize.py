"""Keeps text that a model wrote, or a file holds, from driving the terminal."""

from __future__ import annotations

import re

__all__ = ["Sanitizer", "sanitize", "without_controls"]

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidi marks, embeddings, overrides, isolates
    "\u2028\u2029\ufff9-\ufffb"  # line and paragraph separators, interlinear annotation
    "\ud800-\udfff"  # lone surrogates
    "\U000e0000-\U000e007f]"  # invisible tag characters
)
_CSI_BODY = re.compile("[\x20-\x3f]")
_ESCAPE, _CSI, _STRING, _STRING_ESCAPE = "escape", "csi", "string", "string-escape"
_C1_STRINGS = "\x90\x98\x9d\x9e\x9f"  # DCS SOS OSC PM APC
_7BIT_STRINGS = "PX]^_"
_LONGEST = 4096


class Sanitizer:
    """Removes control sequences from a stream, whatever way it is cut into chunks.

    CSI, OSC, DCS, APC, PM and SOS go with their content (a string sequence ends at the latest at a line break or
    after 4096 characters, so that a stray introducer cannot swallow the answer), other control characters alone.
    No ESC and no C1 is ever let through: what is left can be no sequence.
    """

    def __init__(self) -> None:
        self._state = ""
        self._length = 0

    def feed(self, text: str) -> str:
        """The safe part of ``text``, given all text before it."""
        if not self._state and not _UNSAFE.search(text):
            return text
        return "".join(c for c in text if self._visible(c))

    def _visible(self, c: str) -> bool:
        """Takes one character; True if it is to be shown."""
        if self._state:
            return self._in_sequence(c)
        if c == "\x1b":
            self._state = _ESCAPE
        elif c == "\x9b":
            self._enter(_CSI)
        elif c in _C1_STRINGS:
            self._enter(_STRING)
        else:
            return not _UNSAFE.match(c)
        return False

    def _enter(self, state: str) -> None:
        self._state, self._length = state, 0

    def _in_sequence(self, c: str) -> bool:
        state, self._length = self._state, self._length + 1
        if c in "\n\x18\x1a" or self._length > _LONGEST:  # a line break, CAN and SUB end every sequence
            self._state = ""
            return c == "\n" or (self._length > _LONGEST and self._visible(c))
        if c == "\x1b":
            self._state = _STRING_ESCAPE if state in (_STRING, _STRING_ESCAPE) else _ESCAPE
        elif state in (_ESCAPE, _STRING_ESCAPE):
            self._after_escape(c, state)
        elif state == _STRING:
            if c in "\x07\x9c":
                self._state = ""
        elif not _CSI_BODY.match(c):
            self._state = ""
        return False

    def _after_escape(self, c: str, state: str) -> None:
        if c == "[":
            self._enter(_CSI)
        elif c in _7BIT_STRINGS:
            self._enter(_STRING)
        elif "\x20" <= c <= "\x2f":  # intermediate byte: one more follows
            pass
        elif state == _STRING_ESCAPE and c != "\\":
            self._state = _STRING
        else:
            self._state = ""


def sanitize(text: str) -> str:
    """A whole text made safe for a terminal."""
    return Sanitizer().feed(text)


def without_controls(text: str) -> str:
    """Text without the characters that are never let through; of a sequence, the rest is left and does nothing."""
    return _UNSAFE.sub("", text) if _UNSAFE.search(text) else text
