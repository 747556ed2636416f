"""Where the terminal goes away, so does the chat."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading

__all__ = ["end_with_terminal"]


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
