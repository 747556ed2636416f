"""What all tests of the interface share: the same terminal, whatever the one is that they are started on."""

from __future__ import annotations

import os
from pathlib import Path

import PIL.Image
import pytest
from textual.notifications import Notification

for _name in [name for name in os.environ if name.startswith("TEXTUAL_") and "SNAPSHOT" not in name]:
    del os.environ[_name]  # read when Textual is imported

OTHERS = ("NO_COLOR", "FORCE_COLOR", "TMUX", "STY", "TERM_PROGRAM", "KITTY_WINDOW_ID", "KONSOLE_VERSION",
          "COLUMNS", "LINES", "SSH_TTY", "SSH_CONNECTION")  # fmt: skip


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 16 million colours, without pictures."""
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture(autouse=True)
def _notes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told in passing is there when a test gets to it, however long it takes on a busy machine."""
    monkeypatch.setattr(Notification, "time_left", 1e6)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A file of a picture."""
    path = tmp_path / "my photo.png"
    PIL.Image.new("RGB", (64, 48), (200, 10, 10)).save(path)
    return path
