"""The clipboard and the screen, by the programs that desktops have for them; over SSH, by the terminal (OSC 52)."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from localvlm.errors import ImageError, StorageError

if TYPE_CHECKING:
    from localvlm.images import Image

__all__ = ["copy_by_program", "copy_text", "picture_of_clipboard", "picture_of_screen"]

SECONDS = 10
TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff", "text/uri-list")
OSC_52_BYTES = 74_994
"""Of base64, that terminals commonly take."""
TERMINAL = Path("/dev/tty")
WAYLAND_SHOTS = (("spectacle", "-n", "-b", "-f", "-o"), ("gnome-screenshot", "-f"))
"""Programs of desktops where grim cannot see the screen; they want a file's name behind."""


def picture_of_clipboard() -> bytes | str:
    """The file of the picture in the clipboard, or the address of a file that was copied.

    Raises:
        ImageError: there is none, or no program that tells.
    """
    if sys.platform == "darwin":
        said = _said(["osascript", "-e", "get the clipboard as «class PNGf»"])
        if not said.startswith("«data PNGf".encode()):
            _no_picture()
        return bytes.fromhex(said[11:-3].decode("ascii"))
    if os.environ.get("WAYLAND_DISPLAY") and shutil.which("wl-paste"):
        listing, reading = ["wl-paste", "--list-types"], ["wl-paste", "--no-newline", "--type"]
    elif os.environ.get("DISPLAY") and shutil.which("xclip"):
        reading = ["xclip", "-selection", "clipboard", "-o", "-t"]
        listing = [*reading, "TARGETS"]
    else:
        raise ImageError(
            "no program was found that reads the clipboard", "install wl-clipboard (Wayland) or xclip (X11)"
        )
    there = _listed(listing)
    kind = next((kind for kind in TYPES if kind in there), None)
    said = _said([*reading, kind]) if kind else b""
    if not said:
        _no_picture()
    return said.decode("utf-8", "replace").splitlines()[0] if kind == "text/uri-list" else said


def _listed(command: Sequence[str]) -> list[str]:
    """Types of what the clipboard holds.

    Raises:
        ImageError: the desktop cannot be reached.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    told = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode and re.search("display|wayland", told, re.IGNORECASE):
        raise ImageError(f"the clipboard cannot be reached: {told.splitlines()[-1]}", "give a file")
    return done.stdout.decode("utf-8", "replace").split() if not done.returncode else []


def _no_picture() -> NoReturn:
    raise ImageError("the clipboard holds no picture", "copy one, or give a file")


def _said(command: Sequence[str]) -> bytes:
    """What a program says; nothing where it fails or comes to no end."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout


def picture_of_screen() -> Image:
    """What the screen shows now.

    Raises:
        ImageError: it cannot be seen from here.
    """
    import numpy as np
    from PIL import ImageGrab

    from localvlm.images import Image, load

    if sys.platform != "darwin" and os.environ.get("WAYLAND_DISPLAY"):  # where X11's screen is black
        return load(_wayland_screen(), "(screen)")
    try:
        shown = ImageGrab.grab()
    except (OSError, subprocess.SubprocessError) as error:
        if sys.platform == "linux" and not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
            why, hint = "neither DISPLAY nor WAYLAND_DISPLAY is set", "give a file"
        else:
            why, hint = str(error), "install grim, gnome-screenshot or spectacle, or give a file"
        raise ImageError(f"no picture of the screen could be taken: {why}", hint) from error
    return Image(np.ascontiguousarray(shown.convert("RGB")), "(screen)")


def _wayland_screen() -> bytes:
    """A picture file of it.

    Raises:
        ImageError: no program takes it.
    """
    import tempfile

    if said := _said(["grim", "-"]):
        return said
    for command in WAYLAND_SHOTS:
        if shutil.which(command[0]):
            with tempfile.TemporaryDirectory(prefix="localvlm-") as folder:
                target = Path(folder, "screen.png")
                _said([*command, str(target)])
                if target.exists():
                    return target.read_bytes()
    raise ImageError(
        "no picture of the screen could be taken: no program that sees this Wayland desktop is there",
        "install spectacle (KDE), gnome-screenshot (GNOME) or grim (others), or give a file",
    )


def copy_text(text: str) -> str:
    """Puts text into the clipboard; what was done, for people.

    Raises:
        StorageError: there is no way.
    """
    if (how := copy_by_program(text)) is not None:
        return how
    encoded = base64.b64encode(text.encode("utf-8", "replace"))
    if len(encoded) > OSC_52_BYTES:
        raise StorageError("the answer is too long for a terminal's clipboard", "install wl-clipboard, xclip or xsel")
    try:
        with TERMINAL.open("wb", buffering=0) as terminal:
            terminal.write(b"\x1b]52;c;" + encoded + b"\x07")
    except OSError as error:
        raise StorageError(
            "the answer was not copied: no clipboard here", "install wl-clipboard, xclip or xsel"
        ) from error
    return "handed to the terminal's clipboard"


def copy_by_program(text: str) -> str | None:
    """Puts text into the clipboard of this desktop; what was done, None: there is none, or the desktop is elsewhere."""
    if not (os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY")):
        for tool, *flags in _writers():
            if shutil.which(tool) and _takes([tool, *flags], text):
                return f"copied by {tool}"
    return None


def _writers() -> list[list[str]]:
    """Programs that this desktop may have, with flags."""
    if sys.platform == "darwin":
        return [["pbcopy"]]
    wayland = [["wl-copy"]] if os.environ.get("WAYLAND_DISPLAY") else []
    x11 = [["xclip", "-selection", "clipboard"], ["xsel", "-ib"]] if os.environ.get("DISPLAY") else []
    return wayland + x11


def _takes(command: Sequence[str], text: str) -> bool:
    """Whether a program takes text; some stay behind to hold it, so their output is not waited for."""
    quiet = subprocess.DEVNULL
    try:
        data = text.encode("utf-8", "replace")
        subprocess.run(command, input=data, stdout=quiet, stderr=quiet, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
