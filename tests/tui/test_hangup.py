"""A terminal that is closed ends the chat, and its worker; a chat that is ended leaves the terminal in order."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.tui.terminal import DEADLINE, Terminal, untouched_lines

CHAT = "[sys.executable, '-m', 'localvlm', 'chat', '--pair', 'demo', '--threads', '1']"
STARTED = {
    "by itself": f"os.execv(sys.executable, {CHAT})",
    "under nohup": f"signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, {CHAT})",
    "by a program that outlives it": (
        f"signal.signal(signal.SIGHUP, lambda *_: None); subprocess.Popen({CHAT}).wait(); os.read(0, 1)"
    ),
}
ALONE = list(STARTED)[:2]
"""Ways in which it is the chat that leads the terminal."""


@pytest.mark.parametrize("how", STARTED)
def test_a_terminal_that_is_closed_ends_the_chat(tmp_path: Path, how: str) -> None:
    with Terminal(
        ["-c", f"import os, signal, subprocess, sys; {STARTED[how]}"], env={"LOCALVLM_HOME": str(tmp_path)}
    ) as t:
        t.until(b"ready")
        started = psutil.Process(t.pid)
        end = time.monotonic() + DEADLINE
        while len(ended := started.children(recursive=True)) < 1 + (how not in ALONE):  # ready: to be started
            assert time.monotonic() < end
            t.read(0.05)
        t.hang_up()
        _, alive = psutil.wait_procs(ended, timeout=DEADLINE)
        assert not alive
        if how in ALONE:
            while not os.waitpid(t.pid, os.WNOHANG)[0]:
                assert time.monotonic() < end
                time.sleep(0.01)
            t.pid = 0


def test_sigterm_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with Terminal(["-m", "localvlm", "chat", "--pair", "demo"], env={"LOCALVLM_HOME": str(tmp_path)}) as t:
        before = untouched_lines()  # those of ``t`` may be the chat's by now
        t.until(b"ready")
        assert t.lines != before
        said = len(t.said)
        os.kill(t.pid, signal.SIGTERM)
        assert t.ended() == 143
        for taken_back in (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?25h"):  # other screen, mouse, hidden cursor
            assert taken_back in t.said[said:]
        assert t.lines == before
