"""The history browser: what is listed, what keys do to it, and that nothing of it waits for the database."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from textual.widgets import Input

from localvlm.errors import StorageError
from localvlm.history import History, StoredTurn
from localvlm.tui.screens import history as history_screen
from localvlm.tui.screens.confirm import ConfirmScreen
from localvlm.tui.screens.history import HistoryScreen
from tests.tui.chat_app import pressed_at_once
from tests.tui.chatting import DEADLINE
from tests.tui.stage import idle, played, press, settled, shown

HOSTILE = "[red]x[/] [@click=app.quit]y[/] \x1b]0;title\x07\x1b[31mz\n\u202eevil"


@pytest.fixture
def history(tmp_path):
    with History.open(tmp_path / "history.db") as found:
        for title, pair, answers in (("Was steht auf dem Schild?", "demo", ["Halt."]),
                                     ("What colour is the star?", "demo", ["Yellow.", "Five."]),
                                     (HOSTILE, None, [HOSTILE])):  # fmt: skip
            conversation = found.begin(title, pair)
            for answer in answers:
                found.add(conversation, StoredTurn(title, answer, "model"))
        yield found


def titles(history) -> list[str]:
    return [one.title for one in history.conversations()]


def browse(history, tmp_path, *keys, look=lambda app: None, size=(80, 24)):
    async def act(pilot):
        await press(pilot, *keys)
        look(pilot.app)

    return played(HistoryScreen(history, tmp_path / "exports"), act, size)


def test_it_lists_the_newest_first_and_nothing_of_it_is_markup_or_drives_the_terminal(history, tmp_path):
    def look(app):
        text = shown(app)
        assert "[red]x[/] [@click=app.quit]y[/] z evil" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert text.index("[red]") < text.index("What colour") < text.index("Was steht")
        assert "demo  2 turns" in text
        assert "asked: [red]x[/]" in text, "the chosen one is shown"

    assert browse(history, tmp_path, look=look) == []


def test_typing_searches_and_enter_resumes_what_is_found(history, tmp_path):
    seen = []
    wanted = history.conversations("star")[0].id
    assert browse(history, tmp_path, "+yellow", look=lambda app: seen.append(shown(app))) == []
    assert "What colour" in seen[0]
    assert "Was steht" not in seen[0]
    assert browse(history, tmp_path, "+yellow", "enter") == [wanted]
    assert browse(history, tmp_path, "+nowhere", "enter", look=lambda app: seen.append(shown(app))) == []
    assert "nothing of that is in the history" in seen[1]


@pytest.mark.parametrize("size", [(40, 12), (80, 24)])
def test_how_many_there_are_is_told_where_not_all_are_listed(history, tmp_path, size, monkeypatch):
    monkeypatch.setattr(history_screen, "MOST", 2)
    seen = []
    for keys in ([], ["+st"], ["+st", "backspace", "backspace"]):
        browse(history, tmp_path, *keys, look=lambda app: seen.append(shown(app)), size=size)
    assert ["History \u00b7 2 of 3" in text for text in seen] == [True, False, True]
    assert "History" in seen[1]


@pytest.mark.parametrize("size", [(40, 12), (80, 24)])
def test_that_there_is_nothing_is_told_on_any_screen(history, tmp_path, size):
    seen = []
    browse(history, tmp_path, "+nowhere", "down", "enter", look=lambda app: seen.append(shown(app)), size=size)
    assert seen[0].count("nothing of that is in the history") == 1
    assert "Was steht" not in seen[0]
    for one in history.conversations()[1:]:
        history.delete(one.id)
    browse(
        history, tmp_path, "down", "d", "y", "down", "enter", "d", look=lambda app: seen.append(shown(app)), size=size
    )
    assert "nothing is in the history yet" in seen[1]


def test_arrows_choose_and_letters_act_in_the_list_alone(history, tmp_path):
    order = [one.id for one in history.conversations()]
    assert browse(history, tmp_path, "down", "enter") == [order[0]], "the first down leads to the first"
    assert browse(history, tmp_path, "down", "down", "down", "enter") == [order[2]]
    before = titles(history)
    browse(history, tmp_path, "+red", look=lambda app: shown(app))  # r, e and d are text while one searches
    assert titles(history) == before


@pytest.mark.parametrize("typed", ["day", "dyes", "zebra"])
def test_what_is_typed_fast_behind_a_slash_is_searched_and_no_key_of_the_list(history, tmp_path, typed):
    before, seen = titles(history), []

    async def act(pilot):
        await press(pilot, "down")
        pressed_at_once(pilot.app, "slash", *typed)
        await settled(pilot)
        seen.append((type(pilot.app.screen), pilot.app.screen.query_one(Input).value))

    assert played(HistoryScreen(history, tmp_path / "exports"), act) == []
    assert seen == [(HistoryScreen, typed)]
    assert titles(history) == before
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize(("last", "resumed"), [("enter", True), ("escape", False)])
def test_keys_behind_a_search_act_behind_it(history, tmp_path, last, resumed):
    wanted = history.conversations("halt")[0].id

    async def act(pilot):
        await press(pilot, "down")
        pressed_at_once(pilot.app, "slash", *"haltx", "backspace", last)
        await settled(pilot)

    assert played(HistoryScreen(history, tmp_path), act) == [wanted if resumed else None]


def test_a_letter_right_behind_down_is_a_key_of_the_list(history, tmp_path):
    seen = []

    async def act(pilot):
        pressed_at_once(pilot.app, "down", "d")
        await settled(pilot)
        seen.append(type(pilot.app.screen))

    assert played(HistoryScreen(history, tmp_path), act) == []
    assert seen == [ConfirmScreen]


def test_r_renames(history, tmp_path):
    screens = []
    keys = ("down", "down", "r", "ctrl+u", "+Star", "enter")
    assert browse(history, tmp_path, *keys, look=lambda app: screens.append(shown(app))) == []
    assert titles(history)[1] == "Star"
    assert "Star" in screens[0]
    browse(history, tmp_path, "down", "down", "r", "enter")
    assert titles(history)[1] == "Star", "as it was"
    browse(history, tmp_path, "r", "escape")
    browse(history, tmp_path, "down", "r", "enter")
    assert HOSTILE in titles(history), "a title that nobody changed is not cleaned in silence"


def test_d_deletes_what_was_chosen_once_that_is_agreed_to(history, tmp_path):
    browse(history, tmp_path, "down", "down", "d", "enter")
    browse(history, tmp_path, "down", "down", "d", "escape")
    browse(history, tmp_path, "down", "down", "d", "n")
    assert len(titles(history)) == 3, "the button that has the focus keeps it"
    seen = []
    browse(history, tmp_path, "down", "down", "d", "y", look=lambda app: seen.append(shown(app)))
    assert "deleted: What colour is the star?" in seen[0]
    assert titles(history) == [HOSTILE, "Was steht auf dem Schild?"]


def test_e_exports_and_says_where_to(history, tmp_path):
    seen = []
    browse(history, tmp_path, "down", "down", "e", look=lambda app: seen.append(shown(app)), size=(160, 24))
    written = list((tmp_path / "exports").rglob("*.md"))
    assert len(written) == 1
    assert "Yellow." in written[0].read_text("utf-8")
    assert "written:" in seen[0]


class Held:
    """A history that answers when it may."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may, self.error, self.threads = threading.Event(), error, set()

    def conversations(self, query="", limit=200):
        self.threads.add(threading.current_thread())
        assert self.may.wait(DEADLINE)
        if self.error:
            raise self.error
        return []


def test_a_database_that_takes_its_time_holds_nothing_up(tmp_path):
    held = Held()

    async def act(pilot):
        await pilot.press(*"abc")
        await idle(pilot)
        assert pilot.app.screen.query_one(Input).value == "abc"
        await pilot.press("escape")
        await idle(pilot)

    app_results = []

    async def play():
        from tests.tui.stage import Stage

        app = Stage(HistoryScreen(held, tmp_path))
        async with app.run_test() as pilot:
            await pilot.pause()
            await act(pilot)
            app_results.extend(app.results)
            held.may.set()
            await settled(pilot)

    import asyncio

    asyncio.run(play())
    assert app_results == [None]
    assert threading.main_thread() not in held.threads


class HeldSearch:
    """A history whose searches take their time."""

    def __init__(self, history):
        self._history, self.may = history, threading.Event()

    def __getattr__(self, name):
        return getattr(self._history, name)

    def conversations(self, query="", limit=200):
        assert not query or self.may.wait(DEADLINE)
        return self._history.conversations(query, limit)


@pytest.mark.parametrize(
    ("keys", "resumed"),
    [
        (("+yellow", "enter"), True),
        (("+yellow", "enter", "enter"), True),
        (("+yellow", "down", "enter"), True),
        (("+yellow", "enter", "+!"), False),  # somebody writes on
    ],
)
def test_enter_before_the_search_is_done_resumes_what_is_found(history, tmp_path, keys, resumed):
    wanted, held = history.conversations("star")[0].id, HeldSearch(history)

    async def act(pilot):
        for key in keys:
            pressed_at_once(pilot.app, *(key[1:] if key.startswith("+") else [key]))
        await idle(pilot)
        held.may.set()

    assert played(HistoryScreen(held, tmp_path), act) == ([wanted] if resumed else [])


def test_a_history_that_cannot_be_read_says_so(tmp_path):
    held = Held(StorageError("'history.db' cannot be read: disk [red]gone", "free some room"))
    held.may.set()
    seen = []
    browse(held, Path(tmp_path), look=lambda app: seen.append(shown(app)))
    assert "'history.db' cannot be read: disk [red]gone (free some room)" in seen[0]
