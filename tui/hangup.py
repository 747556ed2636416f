"""Where the terminal goes away, so does the chat; where the chat is ended, the terminal is left as it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable

__all__ = ["TERMINATED", "end_with_terminal", "when_terminated"]

TERMINATED = 143
"""Exit code, as a shell tells a program that SIGTERM ended."""


def end_with_terminal() -> None:
    """Ends this process when its terminal is closed, by the signal that is sent then; the main thread calls it.

    The signal may not come: to a program under ``nohup``, or one that another started and that outlives the terminal.
    Such a chat would hold its models in memory, and a core, with nobody to leave it.
    """
    if not hasattr(signal, "SIGHUP") or not hasattr(select, "poll"):
        return
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    threading.Thread(target=_watch, args=[sys.stdin.fileno()], name="hangup", daemon=True).start()


def _watch(terminal: int) -> None:
    poll = select.poll()
    poll.register(terminal, 0)  # a hangup is always told
    if any(events & select.POLLHUP for _, events in poll.poll()):
        os.kill(os.getpid(), signal.SIGHUP)


def when_terminated(leave: Callable[[], None]) -> None:
    """Has the loop that runs call ``leave`` at the first SIGTERM; a second one ends the process as it is."""
    loop = asyncio.get_running_loop()

    def terminated() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        leave()

    with contextlib.suppress(NotImplementedError, RuntimeError):  # on Windows, and where it is not the main thread's
        loop.add_signal_handler(signal.SIGTERM, terminated)
