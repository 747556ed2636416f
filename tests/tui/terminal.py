"""A program on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence

__all__ = ["Terminal", "untouched_lines"]

DEADLINE = 120.0
"""Seconds after which a program that says nothing will say nothing more."""


def untouched_lines() -> int:
    """``lines`` of a terminal that no program has changed yet."""
    ours, theirs = pty.openpty()
    lines = int(termios.tcgetattr(ours)[3])
    os.close(ours)
    os.close(theirs)
    return lines


class Terminal:
    """Runs ``python`` with arguments; ``said`` is all that it wrote so far. A context manager: leaving it ends it."""

    def __init__(
        self, args: Sequence[str], size: tuple[int, int] = (100, 30), env: Mapping[str, str] | None = None
    ) -> None:
        self.said = b""
        columns, rows = size
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(env or {})}
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execve(sys.executable, [sys.executable, *args], environment)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        self.hang_up()

    def hang_up(self) -> None:
        """Closes the terminal, as a window that is closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def lines(self) -> int:
        """Whether lines are edited and echoed, and more, as termios has it."""
        return int(termios.tcgetattr(self._fd)[3])

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def read(self, seconds: float) -> bytes:
        """What it writes next, within that time; b"" if nothing, or if it has ended."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return b""
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # it has ended
            data = b""
        self.said += data
        return data

    def until(self, text: bytes, since: int = 0) -> None:
        """Reads until it has written ``text``."""
        end = time.monotonic() + DEADLINE
        while text not in self.said[since:]:
            assert time.monotonic() < end, (text, self.said[-2000:])
            self.read(1.0)

    def ended(self) -> int:
        """Reads to its end; its exit code."""
        end = time.monotonic() + DEADLINE
        while True:
            assert time.monotonic() < end, self.said[-2000:]
            self.read(0.1)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self.read(0.1):
                    pass
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
