"""What the engine tells is shown in larger steps while somebody types."""

from __future__ import annotations

import gc

import pytest
from textual.events import Key

from localvlm.tui import app as app_module
from localvlm.tui import events
from localvlm.tui.yielding import LONGEST_S, SHARE, TYPES_S, Typist, pause_s
from tests.tui.chat_app import ask, chat_app, ended, played_chat, until
from tests.tui.stage import shown


def test_who_writes_types_and_who_sends_waits_for_what_comes():
    now = [0.0]
    typist = Typist(lambda: now[0])
    assert not typist.types
    for key in (Key("a", "a"), Key("space", " "), Key("backspace", "\x7f")):
        typist.pressed(key)
        assert typist.types
    now[0] = TYPES_S
    assert not typist.types
    for key in (Key("enter", "\r"), Key("f1", None), Key("escape", "\x1b")):
        typist.pressed(Key("a", "a"))
        typist.pressed(key)
        assert not typist.types


def test_a_pause_is_as_long_as_its_work_asks_for_and_none_while_nobody_types():
    typist = Typist(lambda: 0.0)
    assert (pause_s(0.01, None), pause_s(0.01, typist)) == (0, 0)
    typist.pressed(Key("a", "a"))
    assert pause_s(0.01, typist) == pytest.approx(0.01 * SHARE)
    assert pause_s(9.0, typist) == LONGEST_S


def test_what_is_told_while_somebody_types_is_held_and_shown_in_its_order_when_a_key_asks_for_it(monkeypatch):
    monkeypatch.setattr(app_module, "pause_s", lambda took, typist: 1e6 * typist.types)

    async def act(pilot):
        app = pilot.app
        await ended(pilot, await ask(pilot, "what?"))
        app.typist._clock = lambda: 0.0  # somebody goes on typing, however long this takes here
        await pilot.press("x")
        app._emit(events.StageBegan(0, "load"))
        await until(pilot, lambda: app._pausing)
        for name in ("encode", "ready"):
            app._emit(events.StageBegan(0, name))
        await until(pilot, lambda: len(app._held) == 2)
        assert "ready" not in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: not app._held and "ready" in shown(app))

    played_chat(chat_app(), act)


def test_garbage_is_collected_again_once_the_first_frame_is_there():
    gc.disable()  # as the command does
    try:
        played_chat(chat_app(), collects)
    finally:
        gc.unfreeze()
        gc.enable()


async def collects(pilot):
    await until(pilot, gc.isenabled)
