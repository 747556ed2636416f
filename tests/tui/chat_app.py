"""The chat's app on the fake engine, driven by keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual import events
from textual.pilot import Pilot

from localvlm.answers import AskOptions
from localvlm.engine.fake import Script
from localvlm.history import History
from localvlm.tui.app import ChatApp
from localvlm.tui.attachments import Attached
from localvlm.tui.exchange import Exchange
from localvlm.tui.setup import ChatSetup
from localvlm.tui.widgets.chips import Chips
from localvlm.tui.widgets.composer import Composer
from localvlm.tui.widgets.saw_panel import SawPanel
from tests.tui.chatting import DEADLINE, HeldEngine, fake_opener
from tests.tui.stage import idle, patient

__all__ = ["answered", "ask", "attach", "chat_app", "ended", "last_exchange", "notes", "played_chat", "pressed_at_once",
           "until"]  # fmt: skip

Act = Callable[[Pilot[int]], Awaitable[None]]


def chat_app(
    guide: Script = Script("red"),
    model: Script = Script("dark red"),
    options: AskOptions = AskOptions(),
    *,
    history: Path | None = None,
    **setup: Any,
) -> ChatApp:
    """An app whose clock stands still; ``app.engine`` is its engine, a HeldEngine; ``history``: the file of one."""
    engine = HeldEngine({"guide": guide, "model": model})
    opens = None if history is None else (lambda: History.open(history))
    app = ChatApp(ChatSetup(fake_opener(engine, options), "fake", history=opens, clock=None, **setup))
    app.engine = engine  # type: ignore[attr-defined]
    return app


def played_chat(
    app: ChatApp, act: Act, size: tuple[int, int] = (120, 36), *, ready: bool = True, toasts: bool = False
) -> None:
    """Runs ``act`` with the app's pilot, once a pair is open, or at the first frame; the engine is ended whatever comes
    of it. ``toasts``: what is told in passing is on the screen, too.
    """

    async def play() -> None:
        async with app.run_test(size=size, notifications=toasts) as pilot:
            patient(pilot)
            await until(pilot, lambda: not ready or (bool(app.query(SawPanel)) and app.options is not None))
            app.query_one(Composer).prompt.cursor_blink = False
            await act(pilot)

    try:
        asyncio.run(play())
    finally:
        app.close()


async def until(pilot: Pilot[int], true: Callable[[], bool]) -> None:
    """Waits for what another thread does, and until it is drawn."""
    drawn = asyncio.Event()
    async with asyncio.timeout(DEADLINE):
        while not true():
            await pilot.pause(0.01)
        pilot.app.call_after_refresh(drawn.set)
        await drawn.wait()
        await idle(pilot)


async def attach(pilot: Pilot[int], *pictures: Attached) -> None:
    """Chips of pictures that were read."""
    await pilot.app.query_one(Chips).add(pictures)
    await idle(pilot)


async def ask(pilot: Pilot[int], question: str) -> Exchange:
    """Types a question and sends it; waits until it is asked."""
    app: ChatApp = pilot.app  # type: ignore[assignment]
    before = len(app.conversation.exchanges)
    app.query_one(Composer).write(question)
    await pilot.press("enter")
    await until(pilot, lambda: len(app.conversation.exchanges) > before)
    return app.conversation.exchanges[-1]


async def answered(pilot: Pilot[int], question: str) -> Exchange:
    """Asks, and waits until the answer is on the screen."""
    exchange = await ask(pilot, question)
    await ended(pilot, exchange)
    return exchange


async def ended(pilot: Pilot[int], exchange: Exchange) -> None:
    """Waits until what came of a question is on the screen."""
    app: ChatApp = pilot.app  # type: ignore[assignment]

    def shown() -> bool:
        message = app.log_view.answer(exchange.turn)
        kinds = ("-guide", "-model", "-failed", "-interrupted")
        return message is not None and any(message.has_class(kind) for kind in kinds)

    await until(pilot, shown)


def last_exchange(pilot: Pilot[int]) -> Exchange:
    """The newest one."""
    return pilot.app.conversation.exchanges[-1]  # type: ignore[attr-defined]


def notes(app: ChatApp) -> str:
    """What was told in passing."""
    return " ".join(note.message for note in app._notifications)


def pressed_at_once(app: ChatApp, *keys: str) -> None:
    """As from a terminal while the app was busy."""
    for key in keys:
        app.post_message(events.Key(key, key if len(key) == 1 else None))
