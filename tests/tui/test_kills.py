"""The engine's worker is killed while the chat shows (R8): told within a second or so, asked again, nothing lost."""

from __future__ import annotations

import os
import signal

import pytest

from localvlm.answers import AskOptions
from localvlm.catalog import example_image, pair_named
from localvlm.history import History
from localvlm.images import load
from localvlm.pipeline import Pipeline
from localvlm.tui.app import ChatApp
from localvlm.tui.attachments import Attached
from localvlm.tui.setup import ChatSetup
from localvlm.tui.widgets.message import AnswerMessage
from tests.tui.chat_app import answered, ask, attach, ended, played_chat, until
from tests.tui.stage import shown

pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
STAGES = ("guide_encode", "guide_prefill", "guide_decode", "encode", "prefill", "decode", "")
POINTS = 20


def chat_of(history):
    def opener(name, private, *, anyway=False):
        return Pipeline.open(pair_named("demo")), AskOptions(exit_at=2.0)  # the guide always looks

    return ChatApp(ChatSetup(opener, "demo", history=lambda: History.open(history), clock=None))


def test_the_worker_may_die_at_any_time(tmp_path):
    """At each of 20 points: a message, a new worker, the same question answered, and all turns in the history."""
    history = tmp_path / "history.db"
    app = chat_of(history)

    async def act(pilot):
        await attach(pilot, Attached(load(example_image()), example_image()))
        await answered(pilot, "What is written on the card?")
        for point in range(POINTS):
            await die_and_go_on(pilot, STAGES[point % len(STAGES)], SIGNALS[point % len(SIGNALS)], point)
        assert "42" in shown(app)

    played_chat(app, act)
    with History.open(history) as kept:
        (conversation,) = kept.conversations()
        assert [turn.status for turn in kept.turns(conversation.id)] == ["done"]


async def die_and_go_on(pilot, stage, number, point):
    """One kill: it is told, the engine is started again, and the question is answered when it is asked again."""
    app = pilot.app
    if stage:
        await kill_in(pilot, stage, number, point)
    else:
        os.kill(app.conversation._pipeline.engine.pid, number)
    await until(pilot, lambda: f"was ended by {number.name}" in said(app))
    await until(pilot, lambda: "runs again" in said(app))
    app.clear_notifications()
    if stage:
        app.composer.write("/regen")
        await pilot.press("enter")
        await until(pilot, lambda: app.conversation.exchanges[-1].status == "done")
        app.composer.write("/undo")
        await pilot.press("enter")
        await until(pilot, lambda: len(app.query(AnswerMessage)) == 1)
        app.composer.clear()


async def kill_in(pilot, stage, number, point):
    """Asks, and kills the worker in that stage of the answer."""
    app = pilot.app
    emit, killed = app.conversation._emit, []

    def watching(event):
        emit(event)
        if getattr(event, "name", "") == stage and event.turn and not killed:
            killed.append(stage)
            os.kill(app.conversation._pipeline.engine.pid, number)

    app.conversation._emit = watching
    exchange = await ask(pilot, f"What colour is star {point}?")
    await ended(pilot, exchange)
    app.conversation._emit = emit
    assert killed == [stage]
    assert exchange.status == "failed"


def said(app):
    return " ".join(note.message for note in app._notifications) + shown(app)
