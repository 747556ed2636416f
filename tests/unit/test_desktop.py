"""A real clipboard and a real screen: those of a virtual X server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pictures

from localvlm import clipboard
from localvlm.errors import ImageError

SIZE = (320, 200)


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an X server whose screen is white."""
    need("Xvfb")
    reading, writing = os.pipe()
    screen = f"{SIZE[0]}x{SIZE[1]}x24"
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", screen, "-wr", "-nolisten", "tcp"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, pass_fds=[writing], stdin=quiet, stdout=quiet, stderr=quiet) as process:
        os.close(writing)
        with os.fdopen(reading) as told:
            number = told.readline().strip()  # once it takes calls
        if not number:
            pytest.skip("Xvfb does not start here")
        yield f":{number}"
        process.terminate()


@pytest.fixture
def desktop(server, monkeypatch) -> None:
    for name in ("WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", server)


def until(found: Callable[[], bool]) -> None:
    """xclip ends a moment before the server has heard of it."""
    assert any(found() for _ in range(1000))


def copied(kind: str, data: bytes) -> None:
    quiet = subprocess.DEVNULL
    subprocess.run(
        ["xclip", "-selection", "clipboard", "-t", kind, "-i"], input=data, stdout=quiet, stderr=quiet, check=True
    )
    until(lambda: held("xclip", "-t", kind) == data)  # what was held before may have been of that kind too


def held(xclip: str, *options: str) -> bytes:
    """What the clipboard holds."""
    command = [xclip, "-selection", "clipboard", "-o", *options]
    return subprocess.run(command, capture_output=True, check=False).stdout


@pytest.fixture
def picture(tmp_path) -> Path:
    """Larger than an X server hands over at once."""
    path = tmp_path / "copied one.png"
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    Pictures.fromarray(pixels).save(path)
    return path


def test_what_was_copied_is_asked_about(desktop, cli, picture):
    need("xclip")
    for kind, data in (
        ("image/png", picture.read_bytes()),
        ("text/uri-list", f"file://{picture.parent}/copied%20one.png\r\n".encode()),
    ):
        copied(kind, data)
        run = cli("ask", *cli.pair, "--clip", "-v", "What?")
        assert run.code == 0
        assert "900x700 pixels" in run.err
    copied("UTF8_STRING", b"a word")
    run = cli("ask", *cli.pair, "--clip", "What?")
    assert (run.code, "the clipboard holds no picture" in run.err) == (6, True)


@pytest.mark.parametrize("tool", ["xclip", "xsel"])
def test_an_answer_is_copied(desktop, cli, tool, tmp_path, monkeypatch):
    need("xclip", "xsel")
    alone, reader = tmp_path / "bin", shutil.which("xclip")
    alone.mkdir()
    (alone / tool).symlink_to(str(shutil.which(tool)))
    copied("UTF8_STRING", b"what was there")
    monkeypatch.setenv("PATH", str(alone))
    run = cli.ask("--copy")
    assert (run.code, f"copied by {tool}" in run.err) == (0, True)
    until(lambda: held(str(reader)) == run.out.rstrip("\n").encode())


def test_the_screen_is_asked_about(desktop, cli):
    shown = clipboard.picture_of_screen()
    assert shown.size == SIZE
    assert (shown.rgb == 255).all()
    run = cli("ask", *cli.pair, "--screen", "-v", "What?")
    assert (run.code, "320x200 pixels" in run.err) == (0, True)


def test_a_desktop_that_is_gone_is_told(desktop, monkeypatch):
    need("xclip")
    monkeypatch.setenv("DISPLAY", ":9999")
    with pytest.raises(ImageError, match=r"cannot be reached: .*:9999"):
        clipboard.picture_of_clipboard()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImageError, match=r"could be taken: .*connection"):
        clipboard.picture_of_screen()
