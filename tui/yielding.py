"""Who types comes first: what the engine tells is shown in larger steps meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from textual.events import Key

__all__ = ["Typist", "pause_s"]

SHARE, LONGEST_S = 20, 2.0
"""While somebody types, work of so many seconds is followed by a pause so many times as long, up to LONGEST_S: one key
in twenty meets it, and waits.
"""
TYPES_S = 1.0
"""Seconds from a key on in which its presser is taken to type."""
WRITING = {"backspace", "delete", "left", "right", "ctrl+w", "ctrl+u", "ctrl+k"}
"""Keys of writing, beside those that write a character. All others want to see what comes of them."""


class Typist:
    """Whoever sits at the keys. ``clock``: seconds that only go on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._at = clock, -math.inf

    def pressed(self, key: Key) -> None:
        """A key came."""
        self._at = self._clock() if key.is_printable or key.key in WRITING else -math.inf

    @property
    def types(self) -> bool:
        """Whether a key of writing was the last one, and came just now."""
        return self._clock() - self._at < TYPES_S


def pause_s(took: float, typist: Typist | None) -> float:
    """Seconds to wait behind work on the screen that took that many; none while nobody types."""
    return min(SHARE * took, LONGEST_S) if typist is not None and typist.types else 0.0
