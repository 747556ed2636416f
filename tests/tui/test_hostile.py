"""Nothing that a model, a file or a user's text holds reaches the terminal as anything but text (T1 to T3)."""

from __future__ import annotations

import asyncio
import re

import pytest
from textual.app import App

from localvlm.engine.fake import Script
from localvlm.tui.display import MOST, MOST_JOINED, MOST_OF_LINE, Displayed, displayed
from localvlm.tui.widgets.answer_text import AnswerText
from localvlm.tui.widgets.message import AnswerMessage
from tests.tui.chat_app import answered, chat_app, played_chat
from tests.tui.hostile import ATTACKS, MARK
from tests.tui.stage import shown
from tests.tui.terminal import Terminal


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    """All that the app wrote to a terminal while every text in it was hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    with Terminal(["-m", "tests.tui.hostile", str(folder)], env={"LOCALVLM_HOME": str(folder)}) as terminal:
        code = terminal.ended()
        assert code == 0, terminal.said[-3000:].decode("utf-8", "replace")
        return terminal.said


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_reaches_the_terminal(capture, name):
    ours = re.sub(rb"\x1b\]22;[a-z-]*\x07", b"", capture)  # the shape of the pointer, which Textual sets
    assert ATTACKS[name].encode() not in ours


def test_no_part_of_an_attack_is_a_sequence(capture):
    """Not even one that was put together anew: no string sequence, no C1, no sequence with the attacks' mark."""
    assert not re.search(rb"\x1b\][^\x1b\x07]*owned|\x1b\]52;c;(ZXZp|7741)|\x1b\]8;", capture)
    assert not re.search(rb"\x1b[P_^X][^\x1b]*(7741|544e|AAAA|secret)", capture)
    assert not re.search(rb"\xc2[\x80-\x9f]", capture)
    assert not re.search(rb"\x1b\[[0-9;?]*;?" + MARK.encode() + rb"[A-Za-z]", capture)
    for hidden in ("\u202e", "\u2066", "\U000e0041"):
        assert hidden.encode() not in capture


def test_what_is_text_is_shown(capture):
    assert b"[red]red[/]" in capture
    assert b"[@click=app.quit]quit[/]" in capture
    assert b"[link](https://example.org)" in capture


# ---- what is shown -----------------------------------------------------------------------------------------------


def cut(text, size):
    stream = Displayed()
    return "".join(stream.feed(text[i : i + size]) for i in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_what_is_shown_does_not_depend_on_the_pieces(size):
    text = "".join(ATTACKS.values()) + "a" * (MOST_OF_LINE + 9) + "\nb\u200d" + "\u200d" * 99 + "c\n" + "d" * 99
    assert cut(text, size) == displayed(text)


def test_long_lines_and_answers_are_bounded_and_what_is_hidden_counted():
    stream = Displayed()
    line = stream.feed("x" * 1_000_000)
    assert (len(line), line[-1], stream.hidden) == (MOST_OF_LINE + 1, "\u2026", 1_000_000 - MOST_OF_LINE)
    stream = Displayed()
    text = "".join(stream.feed("word\n") for _ in range(MOST // 5 + 100))
    assert (len(text), stream.hidden) == (MOST, 500)


def test_runs_without_a_width_are_bounded():
    assert displayed("a" + "\u200d" * 10_000 + "b") == "a" + "\u200d" * MOST_JOINED + "b"
    assert displayed("e\u0301te\u0301") == "e\u0301te\u0301"
    assert displayed("lone \ud83d surrogates \udc00") == "lone  surrogates "
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert displayed(family) == family


LITERALLY = [
    "[red]",
    "[/]",
    "[@click=app.quit]x[/]",
    "[b]bold[/b] $primary",
    "\\[red]",
    "{red}",
    "<b>html</b>",
    "&amp;",
    "&#8238;",
]


@pytest.mark.parametrize("text", LITERALLY)
def test_markup_is_text(text):
    async def act(pilot):
        await answered(pilot, f"what is {text}?")
        said = shown(pilot.app)
        assert f"what is {text}?" in said
        assert text.replace("\\[", "[") in said.replace("\\[", "[")

    played_chat(chat_app(Script(text), Script(text)), act)


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "lone \ud83d surrogates \udc00", "a" + "\u200d" * 10_000,
     "| a | b |\n|---|---|\n" + "| c | d |\n" * 50, "#" * 500, "> " * 300 + "deep", "* " * 200 + "x", "```" + "`" * 300,
     "1. a\n" * 100],
)  # fmt: skip
def test_odd_answers_are_shown_and_kept_whole(text):
    async def act(pilot):
        exchange = await answered(pilot, "what?")
        said = text.encode("utf-8", "ignore").decode().strip()  # as the engine has it
        assert exchange.text == said
        message = pilot.app.query(AnswerMessage).last()
        assert message.raw.strip() == said
        assert len(message.query_one(AnswerText).source) <= MOST

    from localvlm.answers import AskOptions

    most = AskOptions(max_tokens=1_100_000, method="none")
    played_chat(chat_app(Script("red"), Script(text, n_ctx=4_000_000), most), act)


def test_links_and_pictures_of_an_answer_cannot_be_followed():
    class Shown(App[None]):
        def compose(self):
            yield AnswerText()

        def open_url(self, url, *, new_tab=True):
            raise AssertionError(url)

    async def play():
        app = Shown()
        async with app.run_test() as pilot:
            text = app.query_one(AnswerText)
            text.feed(
                "[a](file:///etc/passwd) ![b](http://example.org/x.png) https://example.org <http://a.org>\n\n[c]: http://x"
            )
            await text.finish()
            await pilot.pause()
            metas = [
                segment.style.meta
                for strip in app.screen._compositor.render_strips()
                for segment in strip
                if segment.style
            ]
            assert not any("@click" in meta for meta in metas)
            assert all(
                segment.style is None or segment.style.link is None
                for strip in app.screen._compositor.render_strips()
                for segment in strip
            )
            await pilot.click(AnswerText, offset=(2, 0))

    asyncio.run(play())
