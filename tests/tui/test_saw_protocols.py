"""Kitty's graphics and sixels: what is written is decoded again, and how a terminal is told apart."""

from __future__ import annotations

import base64
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest

from localvlm.errors import UsageError
from localvlm.tui.picture import MOST_CELLS, VARIABLE, Protocol, forgotten, placeholders, protocol_of, sent, sixels
from localvlm.tui.picture.kitty import NUMBERS

rng = np.random.default_rng(3)


# ---- which


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, "sixel"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"KONSOLE_VERSION": "230805"}, "sixel"),
        ({"KONSOLE_VERSION": "210402"}, "blocks"),
        ({"KONSOLE_VERSION": "new"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x,1,0", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", VARIABLE: "none"}, "none"),
        ({"TMUX": "x", VARIABLE: "kitty"}, "kitty"),
        ({VARIABLE: ""}, "blocks"),
    ],
)
def test_the_environment_tells(environment, found) -> None:
    assert protocol_of(environment) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("version: Version = Version(0, 26, 5)", "blocks"),
        ("version: Version = Version(0, 28, 0)", "kitty"),
        ("version = (1, 0, 0)", "kitty"),
        ("nothing of that kind", "kitty"),
        (None, "kitty"),
    ],
)
def test_a_kitty_without_placeholders_gets_half_blocks(tmp_path: Path, line: str | None, found: str) -> None:
    """Debian 12 has 0.26, which shows each placeholder as an empty box."""
    if line is not None:
        (tmp_path / "kitty").mkdir()
        (tmp_path / "kitty" / "constants.py").write_text(f"class Version(NamedTuple):\n    major: int\n\n\n{line}\n")
    assert protocol_of({"TERM": "xterm-kitty", "KITTY_INSTALLATION_DIR": str(tmp_path)}) == found


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match="'jpeg'") as error:
        protocol_of({VARIABLE: "jpeg"})
    assert all(way in error.value.hint for way in Protocol)


# ---- kitty

COMMAND = re.compile("\x1b_G([^;\x1b]*)(?:;([^\x1b]*))?\x1b\\\\")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 61), (200, 300)])
def test_kitty_gets_the_pixels(height: int, width: int) -> None:
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    text = sent(pixels, 70_000, 12, 5)
    commands = COMMAND.findall(text)
    assert COMMAND.sub("", text) == "", "nothing stands between the commands"
    keys = [dict(pair.split("=") for pair in found.split(",")) for found, _ in commands]
    assert {k: keys[0][k] for k in "aUftoisvcr" if k in keys[0]} == {
        "a": "T", "U": "1", "f": "24", "o": "z", "i": "70000", "s": str(width), "v": str(height), "c": "12", "r": "5",
    }  # fmt: skip
    assert all(k["q"] == "2" for k in keys), "the terminal answers nothing"
    assert [k["m"] for k in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, data in commands)
    assert all(len(data) % 4 == 0 for _, data in commands[:-1])
    raw = zlib.decompress(base64.b64decode("".join(data for _, data in commands), validate=True))
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(height, width, 3), pixels)


def test_tmux_hands_kittys_commands_on() -> None:
    pixels = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    wrapped = re.findall("\x1bPtmux;((?:\x1b\x1b|[^\x1b])*)\x1b\\\\", sent(pixels, 9, 3, 2, tmux=True))
    assert "".join(part.replace("\x1b\x1b", "\x1b") for part in wrapped) == sent(pixels, 9, 3, 2)


def test_a_picture_is_forgotten_by_its_number() -> None:
    [(keys, data)] = COMMAND.findall(forgotten(70_000))
    assert dict(pair.split("=") for pair in keys.split(",")) == {"a": "d", "d": "I", "q": "2", "i": "70000"}
    assert data == ""


def test_placeholders_name_picture_row_and_column() -> None:
    number = 0x0A_0B_0C
    strips = placeholders(number, 7, 4)
    for y, strip in enumerate(strips):
        assert strip.cell_length == 7
        [segment] = list(strip)
        assert segment.style is not None
        assert tuple(segment.style.color.get_truecolor()) == (0x0A, 0x0B, 0x0C)
        cells = re.findall("\U0010eeee(.)(.)", segment.text)
        assert [(NUMBERS.index(row), NUMBERS.index(column)) for row, column in cells] == [(y, x) for x in range(7)]
        assert segment.cell_length == 7


def test_numbers_are_those_of_the_protocol() -> None:
    """The first, some within and the last that are used, of the protocol's own list."""
    places = {0: 0x305, 1: 0x30D, 4: 0x312, 5: 0x33D, 17: 0x363, 30: 0x483, 53: 0x5C4, 80: 0x6E4, 128: 0x82D}
    assert {i: ord(NUMBERS[i]) for i in places} == places
    assert len(set(NUMBERS)) == MOST_CELLS == 129
    assert unicodedata.normalize("NFC", "e" + NUMBERS) == "e" + NUMBERS


# ---- sixels


def decoded(text: str) -> np.ndarray:
    """A terminal's own way: colours, runs, bands."""
    found = re.fullmatch('\x1bP[0-9;]*q"1;1;([0-9]+);([0-9]+)(.*)\x1b\\\\', text, re.DOTALL)
    assert found
    width, height, body = int(found[1]), int(found[2]), found[3]
    palette, pixels = {}, np.full((height + 5, width, 3), -1, int)
    colour, x, top = 0, 0, 0
    for define, rgb, select, count, code, control in re.findall(
        r"#(\d+);2;(\d+;\d+;\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$\-])", body
    ):
        if define:
            palette[int(define)] = [round(int(part) * 255 / 100) for part in rgb.split(";")]
        elif select:
            colour = int(select)
        elif control:
            x, top = 0, top + 6 * (control == "-")
        else:
            n, bits = int(count or 1), ord(code) - 63
            for row in range(6):
                if bits >> row & 1:
                    assert (pixels[top + row, x : x + n] == -1).all(), "a pixel is drawn once"
                    pixels[top + row, x : x + n] = palette[colour]
            x += n
    assert (pixels[height:] == -1).all()
    return pixels[:height]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 9), (7, 300), (50, 31)])
def test_sixels_have_the_pixels(height: int, width: int) -> None:
    few = rng.integers(0, 256, (20, 3), dtype=np.uint8)
    pixels = few[rng.integers(0, 20, (height, width))]
    pixels[:, : width // 2] = few[0]  # runs
    found = decoded(sixels(pixels))
    assert np.abs(found - pixels.astype(int)).max() <= 2, "a sixel's colours are in percent"


def test_sixels_of_many_colours_are_near() -> None:
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:64, :64], np.zeros((64, 64), int)), axis=2).astype(np.uint8) * 4
    assert np.abs(decoded(sixels(ramp)) - ramp.astype(int)).mean() < 8


def test_nothing_but_printable_text_is_within_a_sequence() -> None:
    text = sixels(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8))
    assert text.startswith("\x1bP")
    assert text.endswith("\x1b\\")
    assert text[2:-2].isascii()
    assert text[2:-2].isprintable()
