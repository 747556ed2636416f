"""Draws docs/chat-*.svg, ``python docs/make_chat_pictures.py``: a real run with the demo pair, driven by keys.

A picture is opened, three questions are asked, of which the guide's answer is final for one, the retention is changed,
and the conversation is left and resumed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from textual.pilot import Pilot

    from localvlm.tui.app import ChatApp

SIZE = (130, 38)
FOLDER = Path(__file__).parent
QUESTIONS = ("Where can I find the red heart?", "What is written on the card?", "What colour is the star?")
PATIENCE = 300.0
"""Seconds that a step may take on a slow machine."""


def app() -> ChatApp:
    """The chat as ``localvlm chat --pair demo`` starts it."""
    from localvlm.answers import AskOptions, Pair
    from localvlm.calibration import stored
    from localvlm.catalog import pair_named
    from localvlm.history import History
    from localvlm.pipeline import Pipeline
    from localvlm.tui.app import ChatApp
    from localvlm.tui.setup import ChatSetup

    def opener(name: str | None, private: bool, *, anyway: bool = False) -> tuple[Pipeline, AskOptions]:  # noqa: ARG001
        pair: Pair = pair_named(name or "demo")
        found = stored(pair, "sgl+")
        return Pipeline.open(pair), AskOptions(exit_at=None if found is None else found.threshold)

    return ChatApp(ChatSetup(opener, "demo", history=History.open))


class Play:
    """One app on a screen of its own, and pictures of it."""

    def __init__(self, pilot: Pilot[int]) -> None:
        self.pilot = pilot
        self.app: ChatApp = cast("ChatApp", pilot.app)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not true():
                await self.pilot.pause(0.05)
        await self.pilot.pause(0.3)

    async def ask(self, question: str) -> None:
        """Types and sends it, and waits for the answer."""
        before = len(self.app.conversation.exchanges)
        self.app.composer.prompt.focus()
        await self.pilot.press(*({" ": "space", "?": "question_mark"}.get(c, c) for c in question), "enter")
        await self.until(lambda: len(self.app.conversation.exchanges) > before)
        await self.until(lambda: self.app.conversation.exchanges[-1].status != "waiting")
        sys.stdout.write(f"{question} {self.app.conversation.exchanges[-1].text}\n")

    def draw(self, name: str) -> None:
        """Writes what is on the screen."""
        target = FOLDER / f"chat-{name}.svg"
        target.write_text(self.app.export_screenshot(title="localvlm chat"), encoding="utf-8")
        sys.stdout.write(f"drawn: {target.name}\n")


async def talk(play: Play) -> None:
    """A first conversation."""
    from localvlm.tui.widgets.chips import Chips
    from localvlm.tui.widgets.retention_slider import RetentionSlider

    play.app.composer.write("/image example")
    await play.pilot.press("enter")
    await play.until(lambda: bool(play.app.query_one(Chips).attached))
    await play.until(lambda: play.app.options is not None)
    await play.ask(QUESTIONS[0])
    await play.ask(QUESTIONS[1])
    play.draw("answers")
    play.app.query_one(RetentionSlider).focus()
    await play.pilot.press(*["right"] * 25)
    await play.pilot.pause(0.5)
    await play.ask(QUESTIONS[2])
    play.draw("retention")


async def resume(play: Play) -> None:
    """Another day."""
    from localvlm.tui.screens.history import HistoryScreen

    await play.until(lambda: play.app.options is not None)
    await play.pilot.press("ctrl+r")
    await play.until(lambda: isinstance(play.app.screen, HistoryScreen))
    await play.pilot.pause(0.5)
    play.draw("history")
    await play.pilot.press("down", "enter")
    await play.until(lambda: len(play.app.conversation.exchanges) == len(QUESTIONS))
    await play.ask("Is there a red circle?")
    play.draw("resumed")


def main() -> None:
    """Plays both parts with a home of their own."""
    os.environ.update(TERM="xterm-256color", COLORTERM="truecolor")
    with tempfile.TemporaryDirectory() as home:
        os.environ["LOCALVLM_HOME"] = home
        for part in (talk, resume):
            chat = app()

            async def run(chat: ChatApp = chat, part: Callable = part) -> None:  # type: ignore[type-arg]
                async with chat.run_test(size=SIZE) as pilot:
                    chat.composer.prompt.cursor_blink = False
                    await part(Play(pilot))

            try:
                asyncio.run(run())
            finally:
                chat.close()


if __name__ == "__main__":
    main()
