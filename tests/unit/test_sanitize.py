"""Text from a model cannot drive the terminal, however it is cut into chunks (T1-T3 of the promises)."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.sanitize import Sanitizer, sanitize

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://example.org\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "clear": "\x1b[2J",
    "alternate screen": "\x1b[?1049l",
    "colour": "\x1b[38;2;1;2;3m",
    "dcs": "\x1bP+q544e\x1b\\",
    "apc": "\x1b_Gf=100;AAAA\x1b\\",
    "pm": "\x1b^secret\x1b\\",
    "sos": "\x1bXsecret\x1b\\",
    "c1 csi": "\x9b31m",
    "c1 osc": "\x9d0;owned\x9c",
    "c1 dcs": "\x90q\x9c",
    "charset": "\x1b(0",
    "reset": "\x1bc",
    "bell": "\x07",
    "backspace": "\x08",
    "return": "\r",
    "override": "\u202e",
    "isolate": "\u2066\u2069",
    "tag": "\U000e0041",
    "escape in osc": "\x1b]0;a\x1b]52;c;x\x07",
}
FRAGMENTS = [
    *ATTACKS.values(),
    "\x1b",
    "\x1b[",
    "\x1b]",
    "[2J",
    "]0;x",
    "\\",
    "\n",
    "\t",
    "é",
    "👩‍👩‍👧",
    "plain text",
    "\x9c",
    "m",
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=12).map("".join)


def is_safe(text: str) -> bool:
    return all(
        c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in "\u202a\u202b\u202c\u202d\u202e")
        for c in text
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_leave_nothing(name):
    assert sanitize(f"a{ATTACKS[name]}b") == "ab"


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_split_at_every_place_leave_nothing(name):
    text = f"a{ATTACKS[name]}b"
    for cut in range(len(text) + 1):
        stream = Sanitizer()
        assert stream.feed(text[:cut]) + stream.feed(text[cut:]) == "ab"


@given(texts)
def test_no_control_character_gets_through(text):
    assert is_safe(sanitize(text))


@given(texts, st.lists(st.integers(0, 200), max_size=6))
def test_chunks_do_not_matter(text, cuts):
    ends = sorted(min(c, len(text)) for c in cuts)
    stream = Sanitizer()
    pieces = [stream.feed(text[a:b]) for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert "".join(pieces) == sanitize(text)


@given(texts)
def test_safe_text_is_a_fixed_point(text):
    assert sanitize(sanitize(text)) == sanitize(text)


@given(st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp"))))
def test_ordinary_text_is_left_alone(text):
    assert sanitize(text) == text


def test_scripts_and_emoji_are_left_alone():
    for text in ("שלום", "مرحبا", "नमस्ते", "👩‍👩‍👧", "a\tb\nc", "\u200d" * 10_000):
        assert sanitize(text) == text


def test_an_open_sequence_cannot_swallow_the_answer():
    assert sanitize("\x1b]0;title\nthe answer") == "\nthe answer"
    assert sanitize("\x1b]0;" + "x" * 10_000).count("x") > 5000


def test_lone_surrogates_are_dropped():
    assert sanitize("a\ud800b") == "ab"
