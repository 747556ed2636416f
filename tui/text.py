"""Text that files, models and hubs hold, made fit for one line of a screen. None of it is ever markup."""

from __future__ import annotations

from pathlib import Path

from localvlm.room import told

from .display import displayed

__all__ = ["one_line", "shown_name", "shown_path", "shown_size"]


def one_line(text: str, longest: int = 500) -> str:
    """Without control sequences, and with single spaces for all white space; no more than so many characters."""
    words = " ".join(displayed(text[: 8 * longest]).split())
    return words if len(words) <= longest else f"{words[: longest - 1]}\u2026"


def shown_name(name: str) -> str:
    """A file's name in which all that is not printable is written as in Python, so that names stay different."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("\\udc", "\\x") for c in name)


def shown_path(path: Path) -> str:
    """A path as :func:`shown_name` writes it, with ``~`` for the home folder."""
    try:
        home = Path.home()
    except RuntimeError:
        return shown_name(str(path))
    if path == home:
        return "~"
    return shown_name(f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path))


def shown_size(n_bytes: int) -> str:
    """Bytes as people read them, small ones too."""
    return told(n_bytes) if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB" if n_bytes >= 1e3 else f"{n_bytes} B"
