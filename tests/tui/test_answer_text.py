"""An answer's Markdown as lines: the same however it comes in pieces, and no dearer where it is long."""

from __future__ import annotations

import asyncio

import pytest
from rich.style import Style
from textual.app import App
from textual.geometry import Offset
from textual.selection import Selection

from localvlm.tui.answer_lines import STYLES, AnswerLines
from localvlm.tui.widgets.answer_text import AnswerText

PLAIN = {name: Style() for name in STYLES}
TEXT = """# A star

It is a **dark red** star; it has
five points.

1. above the *table*
2. left of a `blue` square

   which is small

***

> said before

| shape | colour |
|---|--:|
| star | dark red |

```python
for point in star:

    print(point)
```

Under
=====

The ~~first~~ end"""


def shown(lines, width=40):
    return [strip.text.rstrip() for strip in lines.lines(width, PLAIN)]


def fed(text, size):
    lines = AnswerLines()
    for i in range(0, len(text), size):
        lines.feed(text[i : i + size])
    return lines


def test_what_is_shown():
    assert shown(fed(TEXT, 10_000), 30) == [
        "A star", "", "It is a dark red star; it has", "five points.", "",
        " 1 above the table", " 2 left of a blue square", "   which is small", "", "\u2500" * 30, "",
        "\u258c said before", "",
        "shape     colour", "\u2500" * 16, "star    dark red", "",
        " for point in star:", "", "     print(point)", "",
        "Under", "", "The first end",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_pieces_make_no_difference(size):
    assert shown(fed(TEXT, size)) == shown(fed(TEXT, 10_000))


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_lines_are_laid_out_while_it_comes(size):
    """Whatever was laid out before, at whatever width."""
    lines = AnswerLines()
    for n, i in enumerate(range(0, len(TEXT), size)):
        lines.feed(TEXT[i : i + size])
        lines.lines(20 + n % 3, PLAIN)
    assert shown(lines) == shown(fed(TEXT, 10_000))


def test_a_style_shows():
    lines = fed("a `b` c", 9)
    red = Style(color="red")
    assert [s.text for s in lines.lines(20, {**PLAIN, "code": red})[0] if s.style and s.style.color] == ["b"]


def test_only_what_may_change_is_laid_out_anew(monkeypatch):
    """Characters that are laid out for a long answer are as many as it has, and those of its last block each time."""
    laid = []
    lines_of = AnswerLines._lines_of
    monkeypatch.setattr(
        AnswerLines, "_lines_of", lambda self, text, **k: laid.append(len(text)) or lines_of(self, text, **k)
    )
    lines, block = AnswerLines(), "Some words of a paragraph.\n\n"
    for _ in range(200):
        lines.feed(block)
        lines.lines(40, PLAIN)
    assert sum(laid) <= 3 * 200 * len(block)


@pytest.mark.parametrize("width", [0, 1, 2, 7, 1000])
def test_no_width_is_too_small(width):
    assert AnswerLines().lines(width, PLAIN) == []
    assert fed(TEXT, 9).lines(width, PLAIN)


def test_a_long_answer_is_one_widget_and_can_be_selected():
    class Shown(App[None]):
        def compose(self):
            yield AnswerText()

    async def play():
        app = Shown()
        async with app.run_test(size=(40, 20)) as pilot:
            text = app.query_one(AnswerText)
            text.feed("- a **bold** word\n\nand more\n\n" * 300)
            await text.finish()
            await pilot.pause()
            assert text.region.height == len(text._lines(40)) == 4 * 300 - 1
            assert not text.children
            chosen = Selection(Offset(3, 0), Offset(3, 2))
            assert text.get_selection(chosen) == ("a bold word\n\nand", "\n")
            app.screen.selections = {text: chosen}
            await pilot.pause()
            marked = app.screen.get_component_rich_style("screen--selection").bgcolor
            drawn = [[s.text for s in text.render_line(y) if s.style and s.style.bgcolor == marked] for y in (0, 2, 3)]
            assert ["".join(parts).rstrip() for parts in drawn] == ["a bold word", "and", ""]

    asyncio.run(play())
