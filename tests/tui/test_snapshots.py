"""Pictures of the chat in every state, held against those that were looked at (``pytest --snapshot-update``)."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from textual.widgets import Input

from localvlm.answers import AskOptions
from localvlm.engine.fake import Script
from localvlm.tui.screens.help import HelpScreen
from localvlm.tui.screens.history import HistoryScreen
from localvlm.tui.screens.images import ImageBrowser
from localvlm.tui.screens.settings import SettingsScreen
from localvlm.tui.themes import LIGHT
from localvlm.tui.widgets.chips import Chip
from localvlm.tui.widgets.composer import Composer
from localvlm.tui.widgets.message import AnswerMessage
from localvlm.tui.widgets.saw_panel import SawPanel
from localvlm.tui.widgets.stage_bars import StageBars
from tests.tui.chat_app import answered, ask, attach, chat_app, ended, notes, until
from tests.tui.chatting import HELD, scene
from tests.tui.stage import idle, patient, shown

FOCUS = (0.55, 0.05, 0.95, 0.5)
GUIDE, MODEL = Script("red", focus=FOCUS), Script("dark red", focus=FOCUS)
LONG = """It is a **dark red** star with five points.

- above the table
- left of a `blue` square

| shape | colour |
|---|---|
| star | dark red |
| square | blue |
"""
FINAL = AskOptions(exit_at=0.5)


@pytest.fixture
def seen(snap_compare, monkeypatch, tmp_path):
    """Plays a scene and compares what is on the screen then. No clock, no blinking."""
    ticks = itertools.count()
    monkeypatch.setattr("localvlm.clock.time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.05))
    monkeypatch.chdir(tmp_path)

    def compare(act, size=(120, 36), make=chat_app, **options):
        app = make(
            options.pop("guide", GUIDE), options.pop("model", MODEL), options.pop("options", AskOptions()), **options
        )

        async def before(pilot):
            patient(pilot)
            await until(pilot, lambda: bool(app.query(SawPanel)) and app.options is not None)
            app.query_one(Composer).prompt.cursor_blink = False
            app.query_one(StageBars)._clock = lambda: 0.0
            await until(pilot, lambda: "ready" in shown(app))
            await act(pilot)
            for field in app.screen.query(Input):
                field.cursor_blink = False
            await idle(pilot)

        try:
            return snap_compare(app, run_before=before, terminal_size=size)
        finally:
            app.close()

    return compare


async def nothing(pilot):
    pass


def works_at(app):
    return app.query_one(StageBars)._stage


async def asked(pilot):
    await attach(pilot, scene())
    await answered(pilot, "What colour is the star?")


SIZES = [(120, 36), (40, 14), (80, 24), (200, 50)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_welcome(seen, size):
    assert seen(nothing, size, note="This is the demo pair, which knows drawn scenes only.")


def test_a_question_with_pictures(seen):
    async def act(pilot):
        await attach(pilot, scene("scene.png"), scene("second scene.png", 2))
        await pilot.press(*"Which is", "ctrl+j", *"redder?")

    assert seen(act)


def test_a_chip_with_the_focus(seen):
    async def act(pilot):
        await attach(pilot, scene("scene.png"), scene("second scene.png", 2))
        await pilot.press("shift+tab")

    assert seen(act)


def test_the_guides_draft(seen):
    async def act(pilot):
        await attach(pilot, scene())
        await ask(pilot, "What colour is the star?")
        await until(pilot, lambda: "draft: red" in shown(pilot.app) and works_at(pilot.app) == "encode")

    assert seen(act, model=Script("dark red", encode_s=HELD))


def test_the_model_confirms(seen):
    assert seen(asked, model=GUIDE)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_model_replaces(seen, size):
    assert seen(asked, size, model=Script(LONG, focus=FOCUS))


def test_the_guides_answer_is_final(seen):
    assert seen(asked, options=FINAL)


def test_stopped(seen):
    async def act(pilot):
        await attach(pilot, scene())
        exchange = await ask(pilot, "What colour is the star?")
        await until(pilot, lambda: "draft: red" in shown(pilot.app) and works_at(pilot.app) == "encode")
        await pilot.press("escape")
        await ended(pilot, exchange)

    assert seen(act, model=Script("dark red", encode_s=HELD))


def test_the_engine_died(seen):
    async def act(pilot):
        app = pilot.app
        await asked(pilot)
        model = next(vlm for vlm in app.engine.loaded if vlm.info.name == "model")
        object.__setattr__(model, "_script", Script("dark red", crash_at=model._steps))
        await ended(pilot, await ask(pilot, "And the square?"))
        await until(pilot, lambda: "runs again" in notes(app) and "ready" in shown(app))

    assert seen(act)


def test_a_light_theme(seen):
    assert seen(asked, theme=LIGHT.name, model=Script(LONG, focus=FOCUS))


def test_without_colours(seen, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert seen(asked)


def test_private(seen):
    assert seen(nothing, private=True)


def test_the_panel_alone_where_it_is_narrow(seen):
    async def act(pilot):
        await asked(pilot)
        await pilot.press("f2")

    assert seen(act, (60, 30))


def test_commands(seen):
    async def act(pilot):
        await pilot.press("slash")

    assert seen(act)


def test_paths(seen):
    async def act(pilot):
        for name in ("cat.png", "car.jpg"):
            PIL.Image.new("RGB", (8, 8)).save(name)
        Path("cameras").mkdir()
        await pilot.press("@", "c")
        await until(pilot, lambda: "cameras/" in shown(pilot.app))

    assert seen(act)


def test_the_last_question_is_edited(seen):
    async def act(pilot):
        await asked(pilot)
        await pilot.press("up")
        await until(pilot, lambda: bool(pilot.app.query(Chip)))

    assert seen(act)


def test_a_message_with_the_focus(seen):
    async def act(pilot):
        await asked(pilot)
        pilot.app.query(AnswerMessage).last().focus()

    assert seen(act)


def test_help(seen):
    async def act(pilot):
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(pilot.app.screen, HelpScreen))

    assert seen(act, (100, 50))


def test_palette(seen):
    async def act(pilot):
        await pilot.press("ctrl+p")
        await until(pilot, lambda: "/image PATH" in shown(pilot.app))

    assert seen(act)


def test_settings(seen):
    async def act(pilot):
        await pilot.press("f4")
        await until(pilot, lambda: isinstance(pilot.app.screen, SettingsScreen))
        await until(pilot, lambda: "Temperature" in shown(pilot.app))

    assert seen(act)


def test_history(seen, tmp_path, monkeypatch):
    monkeypatch.setattr("localvlm.history.store.time", SimpleNamespace(time=lambda: 1e9))
    monkeypatch.setattr(HistoryScreen.__init__, "__defaults__", (lambda: 1e9 + 60,))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    async def act(pilot):
        await asked(pilot)
        await pilot.press("ctrl+r")
        await until(pilot, lambda: isinstance(pilot.app.screen, HistoryScreen))
        await until(pilot, lambda: "What colour" in shown(pilot.app))

    assert seen(act, history=tmp_path / "history.db")


def test_pictures(seen):
    async def act(pilot):
        for name in ("cat.png", "car.jpg"):
            PIL.Image.new("RGB", (8, 8)).save(name)
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(pilot.app.screen, ImageBrowser))
        pilot.app.screen.query_one("#folder").update("~/pictures")
        await until(pilot, lambda: "cat.png" in shown(pilot.app))
        pilot.app.screen.query_one("#folder").update("~/pictures")

    assert seen(act)
