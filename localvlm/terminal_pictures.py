"""How pictures reach the terminal: by what the environment says of it, without asking it anything.

A terminal that is asked may not answer, or answer when somebody types. So tmux and screen, which hide what is behind
them, get half blocks, which all terminals show; ``LOCALVLM_PICTURES`` says otherwise.
"""

from __future__ import annotations

import fcntl
import re
import struct
import termios
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from localvlm.errors import UsageError

__all__ = ["VARIABLE", "Protocol", "cell_pixels", "protocol_of"]

VARIABLE = "LOCALVLM_PICTURES"


class Protocol(StrEnum):
    """Ways of showing pictures."""

    BLOCKS = "blocks"
    KITTY = "kitty"
    SIXEL = "sixel"
    NONE = "none"


_KITTY_TERMS, _KITTY_PROGRAMS = ("xterm-kitty", "xterm-ghostty"), ("ghostty", "kitty")
"""Those that know placeholders: a program that knows kitty's graphics may lack these."""
_PLACEHOLDERS = 0, 28
"""Version of kitty from which on it knows them; before, it shows them as letters that no font has."""
_SIXEL_TERMS, _SIXEL_PROGRAMS = ("foot", "mlterm", "contour", "yaft"), ("WezTerm", "iTerm.app", "mintty")
_KONSOLE = 22_04_00
"""Version from which on Konsole shows sixels."""


def protocol_of(environment: Mapping[str, str]) -> Protocol:
    """The best way that the environment tells of; what ``LOCALVLM_PICTURES`` says comes first.

    Raises:
        UsageError: it says none of the ways.
    """
    if asked := environment.get(VARIABLE, ""):
        if asked not in list(Protocol):
            raise UsageError(
                f"{VARIABLE}={asked!r} is no way of showing pictures", f"set {', '.join(Protocol)} or nothing"
            )
        return Protocol(asked)
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if environment.get("TMUX") or environment.get("STY") or term.startswith(("screen", "tmux")):
        return Protocol.BLOCKS
    if environment.get("KITTY_WINDOW_ID") or term in _KITTY_TERMS or program in _KITTY_PROGRAMS:
        return Protocol.KITTY if _knows_placeholders(environment) else Protocol.BLOCKS
    konsole = environment.get("KONSOLE_VERSION", "")
    if (
        term.startswith(_SIXEL_TERMS)
        or program in _SIXEL_PROGRAMS
        or (konsole.isdecimal() and int(konsole) >= _KONSOLE)
    ):
        return Protocol.SIXEL
    return Protocol.BLOCKS


def _knows_placeholders(environment: Mapping[str, str]) -> bool:
    """Whether kitty does, as far as its files tell: the environment has its place, and not its version. One whose files
    are elsewhere, or packed, is taken for a new one.
    """
    if not (place := environment.get("KITTY_INSTALLATION_DIR", "")):
        return True
    try:
        text = Path(place, "kitty", "constants.py").read_text("utf-8", "replace")
    except OSError:
        return True
    found = re.search(r"^version\b.*=.*\((\d+), *(\d+)", text, re.MULTILINE)
    return found is None or (int(found[1]), int(found[2])) >= _PLACEHOLDERS


def cell_pixels() -> tuple[int, int] | None:
    """(width, height) of a cell in pixels, as the system knows it of the terminal; None: it does not."""
    for fd in (2, 1, 0):
        try:
            told = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
        except OSError:
            continue
        rows, columns, width, height = struct.unpack("HHHH", told)
        if rows and columns and width >= columns and height >= rows:
            return width // columns, height // rows
    return None
