"""What works beside the interface, and is closed meanwhile."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from textual.widgets import Static
from textual.worker import WorkerFailed

from localvlm.references import Reference
from localvlm.tui import picture_actions
from localvlm.tui.screens.dialog import Dialog, Rows
from localvlm.tui.screens.history import HistoryScreen
from localvlm.tui.screens.images import ImageBrowser, Place
from localvlm.tui.screens.pairs import PairScreen
from localvlm.tui.screens.pull import PullScreen
from tests.tui.chat_app import answered, chat_app, notes, played_chat, until
from tests.tui.chatting import DEADLINE
from tests.tui.stage import Stage, idle, played, press


@pytest.mark.parametrize("dialog", ["images", "pairs", "history"])
def test_a_dialog_is_closed_while_what_it_looks_up_hangs(dialog, tmp_path, monkeypatch):
    let_go = threading.Event()

    def hangs(*args, **options):
        let_go.wait(DEADLINE)
        return ([], 1) if dialog == "pairs" else []

    class Hanging:
        conversations = hangs

    monkeypatch.setattr("localvlm.tui.screens.images.listed", hangs)
    made = {
        "images": lambda: ImageBrowser(Place(tmp_path)),
        "pairs": lambda: PairScreen(hangs),
        "history": lambda: HistoryScreen(Hanging(), tmp_path),
    }
    app = Stage(made[dialog]())

    async def play():
        async with app.run_test() as pilot:
            await pilot.press("escape")
            while len(app.screen_stack) > 1:
                await pilot.pause(0.01)
            let_go.set()
            await pilot.pause()

    try:
        asyncio.run(play())
    finally:
        let_go.set()
    assert app.results == [None]


class Late(Dialog):
    """Looks for what is not there: once it is closed, or ``at_once``."""

    def __init__(self, at_once):
        super().__init__()
        self.at_once = at_once

    def body(self):
        yield Rows()

    def on_mount(self):
        self.run_worker(self._late())

    async def _late(self):
        try:
            await asyncio.sleep(0 if self.at_once else 1e6)
        finally:
            self.look()

    def look(self):
        self.query_one("#nowhere")


class Detached(Late):
    """Draws on a widget that it had from before."""

    def on_mount(self):
        self.rows = self.query_one(Rows)
        self.rows.loading = True
        super().on_mount()

    def look(self):
        self.rows.loading = False


@pytest.mark.parametrize("made", [Late, Detached])
def test_what_is_missing_is_no_error_once_the_dialog_is_closed(made):
    async def play():
        async with app.run_test() as pilot:
            await pilot.press("escape")
            await idle(pilot)

    app = Stage(made(at_once=False))
    asyncio.run(play())
    assert app.results == [None]


def test_what_is_missing_is_an_error_while_the_dialog_is_there():
    async def play():
        async with Stage(Late(at_once=True)).run_test() as pilot:
            await idle(pilot)

    with pytest.raises(WorkerFailed, match="nowhere"):
        asyncio.run(play())


def test_the_chat_is_left_before_its_panel_is_there(monkeypatch):
    let_go, begun = threading.Event(), threading.Event()

    def hangs():
        begun.set()
        let_go.wait(DEADLINE)
        return Static

    monkeypatch.setattr("localvlm.tui.app._import_panel", hangs)
    app = chat_app()

    async def play():
        async with app.run_test() as pilot:
            while not begun.is_set():
                await pilot.pause(0.01)
            await pilot.press("ctrl+q")
            let_go.set()

    try:
        asyncio.run(play())
    finally:
        let_go.set()
        app.close()
    assert app.return_code == 0


def broken(*given, **options):
    raise ZeroDivisionError("by nobody's intention")


class BrokenHistory:
    conversations = broken


class BrokenHub:
    chosen = pull = broken


@pytest.mark.parametrize(
    "make",
    [
        lambda: PairScreen(broken),
        lambda: PullScreen("tiny", {"model": Reference("u/m")}, hub=lambda progress: BrokenHub()),
        lambda: HistoryScreen(BrokenHistory(), Path()),
        lambda: ImageBrowser(Place(Path.cwd())),
    ],
)
def test_a_defect_in_what_a_dialog_has_done_is_told_and_the_chat_goes_on(make, monkeypatch):
    monkeypatch.setattr("localvlm.tui.screens.images.listed", broken)
    seen = []

    async def act(pilot):
        seen.append(" ".join(str(pilot.app.screen.query_one("#notice").content).split()))
        await press(pilot, "escape")

    assert played(make(), act, (120, 24)) == [None]
    assert "ZeroDivisionError: by nobody's intention" in seen[0]


def test_a_defect_in_reading_a_picture_or_copying_is_told_and_the_chat_goes_on(monkeypatch):
    monkeypatch.setattr(picture_actions, "from_name", broken)
    monkeypatch.setattr("localvlm.clipboard.copy_by_program", broken)

    async def act(pilot):
        app = pilot.app
        await app.attach_name("x.png")
        await until(pilot, lambda: "ZeroDivisionError" in notes(app) and not app.query("Chip"))
        app.copy("text")
        await until(pilot, lambda: app.clipboard == "text")
        await answered(pilot, "what?")

    played_chat(chat_app(), act)
