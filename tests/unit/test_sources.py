"""Every way a picture comes in: paths as people drop them, patterns, pages, HEIC, the web, clipboard and screen."""

from __future__ import annotations

import contextlib
import http.server
import io
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from localvlm import clipboard, images_apart
from localvlm import fetch as fetching
from localvlm.errors import DownloadError, ImageError, Interrupted
from localvlm.fetch import fetch
from localvlm.images import load
from localvlm.sources import sources

SCENE = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48))


def saved(fmt: str, picture: PIL.Image.Image = SCENE, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def names(text: str) -> list[str]:
    return [source.name for source in sources(text)]


# ---- paths


@pytest.mark.parametrize(
    "name", ["plain.png", "two words.png", "it's.png", "a#2.png", "[1].png", "ünï.png", "back\\slash.png"]
)
def test_a_path_is_found_as_terminals_write_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(saved("PNG"))
    quoted = "'" + str(path).replace("'", r"'\''") + "'"
    escaped = "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in str(path))
    for text in (str(path), f" {path} ", quoted, f'"{path}"', escaped, path.as_uri()):
        assert names(text) == [str(path)], text
        assert sources(text)[0].load().size == (64, 48)


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    assert sources("~/a.png")[0].load().size == (64, 48)
    assert sources("~/*.png")[0].load().size == (64, 48)
    with pytest.raises(ImageError, match="does not exist"):
        sources("~nobody-of-this-name/a.png")[0].load()


def test_patterns_find_files_sorted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("b.png", "a.png", "in/c.png"):
        Path(name).write_bytes(saved("PNG"))
    assert names("*.png") == ["a.png", "b.png"]
    assert names("**/*.png") == ["a.png", "b.png", "in/c.png"]
    assert names("*") == ["a.png", "b.png"]
    with pytest.raises(ImageError, match=r"no file matches '\*\.jpg'"):
        sources("*.jpg")


# ---- pages of a PDF, HEIC


@pytest.fixture
def pdf(tmp_path):
    pytest.importorskip("pypdfium2")
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pages = [PIL.Image.new("RGB", (80, 40), colour) for colour in colours]
    path = tmp_path / "two words.pdf"
    path.write_bytes(saved("PDF", pages[0], save_all=True, append_images=pages[1:], resolution=72))
    return path


def test_pages_of_a_pdf(pdf):
    pages = [source.load() for source in sources(f"{pdf}#3,1-2")]
    assert [page.name for page in pages] == [f"{pdf}#3", f"{pdf}#1", f"{pdf}#2"]
    assert [int(page.rgb[20, 20].argmax()) for page in pages] == [2, 0, 1]
    assert pages[0].notes == (f"page 3 of 3, drawn as {pages[0].size[0]}x{pages[0].size[1]} pixels",)
    assert abs(pages[0].size[0] - 80 * 200 / 72) <= 1
    first = load(pdf)
    assert (first.name, first.notes[0][:11]) == (str(pdf), "page 1 of 3")
    np.testing.assert_array_equal(load(pdf.read_bytes()).rgb, pages[1].rgb)


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ("4", "has 3 pages"),
        ("0", "number pages"),
        ("x", "number pages"),
        ("3-2", "number pages"),
        ("1-5000", "over 1000"),
    ],
)
def test_pages_that_are_not_there(pdf, pages, words):
    with pytest.raises(ImageError, match=words):
        sources(f"{pdf}#{pages}")[0].load()


def test_pages_of_what_has_none(tmp_path):
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    with pytest.raises(ImageError, match="has no pages"):
        sources(f"{tmp_path / 'a.png'}#2")[0].load()


def interrupted(*_: object, **__: object) -> None:
    raise Interrupted()


@pytest.fixture
def interrupts():
    """SIGUSR1 does what the command line's Ctrl-C does in the end."""
    before = signal.signal(signal.SIGUSR1, interrupted)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("place", ["PIL.Image.open", "PIL.Image.Image.getexif"])
def test_ctrl_c_while_a_picture_is_decoded_is_no_damage_of_it(monkeypatch, place):
    monkeypatch.setattr(place, interrupted)
    with pytest.raises(Interrupted):
        load(saved("PNG"))


def test_ctrl_c_while_a_picture_is_decoded_apart(monkeypatch, interrupts):
    # once all was written to it: before, whoever starts it may not be done with that
    kill = "import os, signal, sys, time; sys.stdin.buffer.read(); os.kill(os.getppid(), signal.SIGUSR1); "
    kill += "time.sleep(600)"
    monkeypatch.setattr(images_apart, "_BOOT", kill)
    with pytest.raises(Interrupted):
        load(saved("PNG"), apart=True)


def test_ctrl_c_of_the_terminal_does_not_reach_the_decoder_apart(monkeypatch):
    alone = "import os; os.getpgrp() == os.getpid() or os.abort(); "
    monkeypatch.setattr(images_apart, "_BOOT", alone + images_apart._BOOT)
    assert load(saved("PNG"), apart=True).size == (64, 48)


def test_a_pdf_that_is_damaged_or_endless(pdf, monkeypatch):
    for data in (pdf.read_bytes()[:200], b"%PDF-1.7\n"):
        with pytest.raises(ImageError, match="truncated or damaged"):
            load(data)
    wide = saved("PDF", resolution=72).replace(b"[ 0 0 64.0 48.0 ]", b"[ 0 0 90000 9 ]")
    assert 60_000 < load(wide).size[0] <= 65_535
    monkeypatch.setattr(images_apart, "_BOOT", "import os; os.abort()")
    with pytest.raises(ImageError, match="ended its decoder"):
        load(pdf)
    monkeypatch.setattr(images_apart, "_BOOT", "import time; time.sleep(60)")
    monkeypatch.setattr(images_apart, "PATIENCE", 0.2)
    with pytest.raises(ImageError, match="to decode"):
        load(pdf)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "AVIF"])
def test_a_picture_decoded_apart_is_the_same(fmt, monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('code of the folder that the user stands in')")
    monkeypatch.chdir(tmp_path)
    data = saved(fmt, SCENE.convert("RGBA"))
    here, there = load(data), load(data, apart=True)
    np.testing.assert_array_equal(here.rgb, there.rgb)
    assert (here.name, here.notes) == (there.name, there.notes)
    with pytest.raises(ImageError, match="truncated"):
        load(data[: len(data) // 2], apart=True)
    monkeypatch.setattr(images_apart, "_BOOT", "import os; os.abort()")
    with pytest.raises(ImageError, match="ended its decoder"):
        load(data, apart=True)


def test_heic_is_upright_and_needs_its_extra(monkeypatch, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    heif = pillow_heif.from_pillow(SCENE)
    buffer = io.BytesIO()
    heif.save(buffer, quality=100, chroma=444, exif=exif.tobytes())
    (tmp_path / "photo.HEIC").write_bytes(buffer.getvalue())
    photo = load(tmp_path / "photo.HEIC")
    upright = np.asarray(SCENE.transpose(PIL.Image.Transpose.ROTATE_270))
    assert photo.size == (48, 64)
    assert np.abs(photo.rgb.astype(int) - upright).mean() < 6
    with pytest.raises(ImageError, match="truncated"):
        load(buffer.getvalue()[:600])
    monkeypatch.setattr(images_apart, "find_spec", lambda name: None)
    with pytest.raises(ImageError) as caught:
        load(buffer.getvalue())
    assert "localvlm[heic]" in caught.value.hint


# ---- the web


class Pages(http.server.BaseHTTPRequestHandler):
    """A picture, and what servers do wrong."""

    def do_GET(self) -> None:
        body = saved("PNG")
        if self.path == "/moved":
            return self._head(302, Location="/a.png")
        if self.path == "/ftp":
            return self._head(302, Location="ftp://127.0.0.1/a.png")
        if self.path == "/slow":
            return self._drip()
        if self.path == "/missing":
            return self._head(404)
        length = len(body) + 100 if self.path == "/cut" else len(body)
        self._head(200, **{"Content-Length": str(length)})
        self.wfile.write(body)
        return None

    def _drip(self) -> None:
        """A header that comes byte by byte until the test is over."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        with contextlib.suppress(OSError):
            while not self.server.over.wait(0.01):
                self.wfile.write(b"x")

    def _head(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.loopback
def test_a_picture_of_the_web_is_fetched_if_asked_for(site, cli, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert cli("ask", *cli.pair, "--fetch", f"{site}/moved", "What?").code == 0
    refused = cli("ask", *cli.pair, f"{site}/a.png", "What?")
    assert (refused.code, refused.out) == (6, "")
    assert "--fetch" in refused.err
    for place, words in (("missing", "HTTP 404"), ("cut", "cut off after"), ("ftp", "leads to 'ftp:")):
        with pytest.raises(DownloadError, match=words):
            fetch(f"{site}/{place}")
    monkeypatch.setattr(fetching, "MAX_BYTES", 100)
    with pytest.raises(DownloadError, match="is over"):
        fetch(f"{site}/a.png")
    closed = cli("ask", *cli.pair, "--fetch", "http://127.0.0.1:9/a.png", "What?")
    assert (closed.code, "cannot be fetched: Connection refused" in closed.err) == (7, True)


@pytest.mark.loopback
def test_a_server_whose_headers_never_end_is_left(site, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "TOTAL_S", 0.2)
    with pytest.raises(DownloadError, match="/slow' takes over"):
        fetch(f"{site}/slow")


# ---- clipboard and screen


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Writes programs that stand for those of a desktop, and makes them the only ones."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)

    def tool(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (folder / name).chmod(0o755)

    return tool


@pytest.mark.parametrize(
    ("variable", "name", "asks"), [("WAYLAND_DISPLAY", "wl-paste", "--list-types"), ("DISPLAY", "xclip", "TARGETS")]
)
def test_a_picture_in_the_clipboard(tools, monkeypatch, tmp_path, cli, variable, name, asks):
    assert cli("ask", *cli.pair, "--clip", "What?").code == 6  # no program
    monkeypatch.setenv(variable, "0")
    (tmp_path / "copied one.png").write_bytes(saved("PNG"))
    for kinds, says in (
        ("UTF8_STRING image/webp image/png", f"cat '{tmp_path}/copied one.png'"),
        ("text/plain text/uri-list", f"echo file://{tmp_path}/copied%20one.png"),
    ):
        tools(
            name,
            f'case "$*" in *{asks}*) printf "%s\\n" {kinds} ;; *image/png*|*uri-list*) {says} ;; *) exit 1 ;; esac',
        )
        run = cli("ask", *cli.pair, "--clip", "-v", "What?")
        assert run.code == 0
        assert "64x48 pixels" in run.err
    tools(name, f'case "$*" in *{asks}*) echo text/plain ;; *) exit 1 ;; esac')
    assert "holds no picture" in cli("ask", *cli.pair, "--clip", "What?").err


def test_a_picture_of_the_clipboard_of_a_mac(tools, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tools("osascript", f"echo '«data PNGf{saved('PNG').hex().upper()}»'")
    assert load(clipboard.picture_of_clipboard()).size == (64, 48)
    tools("osascript", "exit 1")
    with pytest.raises(ImageError, match="no picture"):
        clipboard.picture_of_clipboard()


def test_a_picture_of_the_screen(tools, monkeypatch, tmp_path):
    with pytest.raises(ImageError, match="of the screen could be taken: neither DISPLAY"):
        clipboard.picture_of_screen()
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    tools("grim", f"cat {tmp_path}/a.png")
    assert clipboard.picture_of_screen().size == (64, 48)
    monkeypatch.delenv("WAYLAND_DISPLAY")
    tools("gnome-screenshot", f'cat {tmp_path}/a.png > "$2"')
    assert clipboard.picture_of_screen().size == (64, 48)


@pytest.mark.parametrize("program", ["spectacle", "gnome-screenshot"])
def test_a_picture_of_the_screen_of_wayland_is_not_taken_of_x11(tools, monkeypatch, tmp_path, cli, program):
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("PIL.ImageGrab.grab", lambda: PIL.Image.new("RGB", (64, 48)))  # black
    tools("grim", "echo compositor does not support it >&2; exit 1")
    run = cli("ask", *cli.pair, "--screen", "What?")
    assert run.code == 6
    assert "no program that sees this Wayland desktop" in run.err
    assert program in run.err
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    tools(program, f'for name; do :; done; cat {tmp_path}/a.png > "$name"')
    np.testing.assert_array_equal(clipboard.picture_of_screen().rgb, load(saved("PNG")).rgb)


@pytest.mark.parametrize(
    ("variable", "name"), [("WAYLAND_DISPLAY", "wl-copy"), ("DISPLAY", "xclip"), ("DISPLAY", "xsel")]
)
def test_text_is_copied_by_what_the_desktop_has(tools, monkeypatch, tmp_path, variable, name):
    monkeypatch.setenv(variable, "0")
    tools(name, f"cat > {tmp_path}/copied; sleep 30 & exit 0")  # what holds a selection stays behind
    assert clipboard.copy_text("a rüd car") == f"copied by {name}"
    assert (tmp_path / "copied").read_text() == "a rüd car"


def test_text_is_copied_by_the_terminal_elsewhere(tools, monkeypatch, tmp_path):
    from localvlm.errors import StorageError

    monkeypatch.setenv("WAYLAND_DISPLAY", "0")
    monkeypatch.setenv("SSH_TTY", "/dev/pts/0")
    tools("wl-copy", "exit 0")
    monkeypatch.setattr(clipboard, "TERMINAL", tmp_path / "tty")
    (tmp_path / "tty").touch()
    assert "terminal" in clipboard.copy_text("hello")
    assert (tmp_path / "tty").read_bytes() == b"\x1b]52;c;aGVsbG8=\x07"
    with pytest.raises(StorageError, match="too long"):
        clipboard.copy_text("x" * 60_000)
    monkeypatch.setattr(clipboard, "TERMINAL", tmp_path / "none" / "tty")
    with pytest.raises(StorageError, match="not copied"):
        clipboard.copy_text("hello")
