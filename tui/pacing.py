"""Text that comes in many small pieces, handed on in fewer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Pacer"]


class Pacer:
    """Hands text on at most once in ``interval`` seconds. Nothing is kept back longer than that.

    ``on_text`` is called by the thread that feeds or by a timer's, never by two at once.
    """

    def __init__(self, on_text: Callable[[str], None], interval: float = 1 / 30) -> None:
        self._on_text, self._interval = on_text, interval
        self._lock = threading.Lock()
        self._held: list[str] = []
        self._timer: threading.Timer | None = None
        self._last = -interval

    def feed(self, text: str) -> None:
        """Takes the next piece."""
        with self._lock:
            self._held.append(text)
            if self._timer is not None:
                return
            wait = self._last + self._interval - time.monotonic()
            if wait <= 0:
                self._hand_on()
                return
            self._timer = threading.Timer(wait, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Hands on what is held."""
        with self._lock:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text, self._held, self._last = "".join(self._held), [], time.monotonic()
        if text:
            self._on_text(text)
