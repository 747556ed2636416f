"""Ctrl-C: the first stops the answer within a second, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from typing import Protocol

from localvlm.errors import Interrupted

__all__ = ["Interrupts"]

GRACE_S = 0.8
"""Seconds the engine has to stop by itself before it is ended."""


class Stoppable(Protocol):
    """What an engine is to those who stop it."""

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Interrupts:
    """While entered, SIGINT goes to the engine. Does nothing outside the main thread, where signals cannot be set."""

    def __init__(self, engine: Stoppable) -> None:
        self._engine = engine
        self._count = 0
        self._before: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGINT, self._interrupt), (signal.SIGALRM, self._too_late)):
                self._before.append((number, signal.signal(number, handler)))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self, *_: object) -> None:
        self._count += 1
        if self._count == 1:
            self._engine.cancel()
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        else:
            self._end_engine()
            os._exit(Interrupted.exit_code)

    def _too_late(self, *_: object) -> None:
        self._end_engine()
        raise Interrupted()

    def _end_engine(self) -> None:
        getattr(self._engine, "kill", self._engine.close)()
