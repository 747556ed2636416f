"""The turns of a long conversation that are not shown until somebody asks for them."""

from __future__ import annotations

import pytest

from localvlm.engine.fake import Script
from localvlm.tui.widgets import chat_log
from localvlm.tui.widgets.chat_log import Earlier
from localvlm.tui.widgets.message import AnswerMessage
from tests.tui.chat_app import answered, chat_app, played_chat, until
from tests.tui.stage import shown


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Three turns are shown, and two more when somebody asks."""
    monkeypatch.setattr(chat_log, "MOST", 3)
    for module in ("chat_log", "history_actions"):
        monkeypatch.setattr(f"localvlm.tui.{'widgets.' * (module == 'chat_log')}{module}.STEP", 2)


async def asked(pilot, n):
    for i in range(1, n + 1):
        await answered(pilot, f"question {i}?")


def test_the_newest_turns_are_shown_and_earlier_ones_when_somebody_asks():
    async def act(pilot):
        app = pilot.app
        await asked(pilot, 6)
        log = app.log_view
        assert (log.turns, log.folded) == ([4, 5, 6], 3)
        app.query_one(Earlier).focus()
        await until(pilot, lambda: "3 earlier turns \u00b7 enter shows 2" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: log.turns == [2, 3, 4, 5, 6])
        assert log.folded == 1
        assert isinstance(app.focused, AnswerMessage)
        assert app.focused.turn == 3
        assert [message.raw for message in log.query(AnswerMessage)] == ["dark red"] * 5
        app.query_one(Earlier).focus()
        await pilot.press("enter")
        await until(pilot, lambda: log.turns == [1, 2, 3, 4, 5, 6])
        assert not app.query_one(Earlier).display
        await asked(pilot, 1)
        assert (log.turns, log.folded) == ([5, 6, 7], 4)

    played_chat(chat_app(), act)


def test_turns_that_were_folded_come_when_all_others_are_taken_back():
    async def act(pilot):
        app = pilot.app
        await asked(pilot, 5)
        for _ in range(3):
            await app.action_undo()
        await until(pilot, lambda: app.log_view.turns == [1, 2])
        assert app.log_view.folded == 0

    played_chat(chat_app(), act)


def test_the_last_question_is_edited_where_it_is_the_only_one_shown(monkeypatch):
    monkeypatch.setattr(chat_log, "MOST", 1)

    async def act(pilot):
        app = pilot.app
        await asked(pilot, 3)
        await app.action_edit_last()
        app.composer.write("another?")
        await pilot.press("enter")
        await until(pilot, lambda: not app.conversation.busy and app.conversation.exchanges[-1].turn == 4)
        await until(pilot, lambda: app.log_view.turns[-1:] == [4] and "dark red" in shown(app))
        assert len(set(app.log_view.turns)) == len(app.log_view.turns)
        assert len(app.log_view.turns) + app.log_view.folded == len(app.conversation.exchanges) == 3

    played_chat(chat_app(), act)


def test_a_long_conversation_is_resumed_at_its_end(tmp_path):
    async def act(pilot):
        await asked(pilot, 5)

    async def resumed(pilot):
        app = pilot.app
        await app._resume(1)
        await until(pilot, lambda: app.log_view.turns == [4, 5])
        assert (app.log_view.folded, len(app.conversation.exchanges)) == (3, 5)
        await until(pilot, lambda: "question 5?" in shown(app) and "earlier" not in shown(app))
        await app.action_new_chat()
        await until(pilot, lambda: not app.query_one(Earlier).display and "Ask a picture." in shown(app))

    played_chat(chat_app(history=tmp_path / "history.db"), act)
    played_chat(chat_app(Script("no"), history=tmp_path / "history.db"), resumed, (60, 12))
