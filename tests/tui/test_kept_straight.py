"""What people do out of turn: nothing written is lost, and every question has its pictures, once."""

from __future__ import annotations

import threading

import pytest

from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import ModelError, ModelNotFound, StorageError
from localvlm.pipeline import Session
from localvlm.tui import history_actions
from localvlm.tui.conversation import Conversation
from localvlm.tui.events import Failed
from localvlm.tui.widgets.chips import Chip, Chips
from localvlm.tui.widgets.stage_bars import StageBars
from localvlm.tui.widgets.status_line import StatusLine
from tests.tui.chat_app import (
    answered,
    ask,
    attach,
    chat_app,
    ended,
    last_exchange,
    notes,
    played_chat,
    pressed_at_once,
    until,
)
from tests.tui.chatting import DEADLINE, HELD, Heard, fake_opener, open_conversation, picture
from tests.tui.stage import shown

HOLDS = Script("dark red", token_s=HELD)
A, B = picture(1), picture(2)


def chips(app):
    return app.query_one(Chips).attached


@pytest.mark.parametrize("do", ["regenerate", "undo", "edit_last"])
def test_another_picture_that_was_attached_stays(do):
    async def act(pilot):
        app = pilot.app
        await attach(pilot, A)
        await answered(pilot, "what?")
        await attach(pilot, B)
        await getattr(app, f"action_{do}")()
        await until(pilot, lambda: chips(app) == ([B] if do == "regenerate" else [B, A]))

    played_chat(chat_app(), act)


def test_a_chip_that_is_removed_twice_goes_once():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, A, B)
        app.query(Chip).first().focus()
        pressed_at_once(app, "backspace", "backspace")
        await until(pilot, lambda: len(chips(app)) < 2)
        chip = Chip("gone", A)
        await app.query_one(Chips).drop(chip)
        await until(pilot, lambda: app.is_running)

    played_chat(chat_app(), act)


def test_method_auto_is_the_pairs_own():
    async def act(pilot):
        app = pilot.app
        own = app.options.method
        await app.action_choose_method("divprune")
        assert app.options.method == "divprune"
        await app.action_choose_method("auto")
        assert app.options.method == own
        await answered(pilot, "what?")

    played_chat(chat_app(), act)


def test_a_question_behind_one_that_fails_has_its_pictures(monkeypatch):
    second_asked, ask_session = threading.Event(), Session.ask

    def fails_first(session, question, *rest):
        if question == "what?":
            second_asked.wait(DEADLINE)
            raise ModelError("broken")
        return ask_session(session, question, *rest)

    monkeypatch.setattr(Session, "ask", fails_first)
    conversation, heard, _ = open_conversation()
    try:
        first = conversation.ask("what?", [A])
        second = conversation.ask("and?", [B])
        second_asked.set()
        heard.answered(second)
        assert (first.status, first.handed_on, second.attached) == ("failed", True, (A, B))
        assert second.answer.tokens.image == 2 * 144
    finally:
        conversation.close()


def test_what_nobody_thought_of_is_told_and_the_conversation_goes_on():
    heard, opens = Heard(), iter([ValueError("no such thing")])
    opened = fake_opener(FakeEngine({"guide": Script("red"), "model": Script("dark red")}))

    def opener(name, private, *, anyway=False):
        if (error := next(opens, None)) is not None:
            raise error
        return opened(name, private)

    conversation = Conversation(opener, heard)
    conversation.start()
    try:
        assert "no such thing" in heard.wait(Failed).error.message
        heard.answered(conversation.ask("what?"))
    finally:
        conversation.close()


def test_undo_while_the_last_question_is_edited_takes_back_that_one():
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "first?")
        await answered(pilot, "second?")
        await app.action_edit_last()
        await app.action_undo()
        assert not app.composer.editing
        assert app.composer.text == "second?"
        await pilot.press("enter")
        await until(pilot, lambda: len(app.conversation.exchanges) == 2)
        assert [e.question for e in app.conversation.exchanges] == ["first?", "second?"]

    played_chat(chat_app(), act)


def test_leaving_an_edit_leaves_pictures_that_were_added():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, A)
        await answered(pilot, "what?")
        await attach(pilot, B)
        await app.action_edit_last()
        await until(pilot, lambda: chips(app) == [B, A])
        await pilot.press("escape")
        await until(pilot, lambda: chips(app) == [B])
        assert (app.composer.text, app.composer.editing) == ("", False)

    played_chat(chat_app(), act)


def test_the_pictures_of_a_stopped_question_come_once_and_stay_where_its_edit_is_left():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, A)
        exchange = await ask(pilot, "what?")
        await app.action_edit_last()
        await until(pilot, lambda: chips(app) == [A])
        await pilot.press("ctrl+c")
        await ended(pilot, exchange)
        assert exchange.status == "interrupted"
        await pilot.press("escape")
        await until(pilot, lambda: not app.composer.editing)
        assert chips(app) == [A]

    played_chat(chat_app(model=HOLDS), act)


@pytest.mark.parametrize(
    ("keys", "questions", "left"),
    [(("q", "?", "enter", "x"), ["q?"], "x"), (("q", "enter", "r", "enter"), ["q", "r"], "")],
)
def test_what_is_written_behind_enter_is_not_sent_with_it(keys, questions, left):
    async def act(pilot):
        app = pilot.app
        pressed_at_once(app, *keys)
        await until(pilot, lambda: [e.question for e in app.conversation.exchanges] == questions)
        await until(pilot, lambda: app.composer.text == left)

    played_chat(chat_app(), act)


def test_commands_that_are_typed_at_once_are_run_in_turn():
    async def act(pilot):
        app = pilot.app
        for question in ("one?", "two?", "three?"):
            await answered(pilot, question)
        app.composer.write("")
        pressed_at_once(app, *"/undo", "enter", "ctrl+u", *"/undo", "enter")
        await until(pilot, lambda: [e.question for e in app.conversation.exchanges] == ["one?"])

    played_chat(chat_app(), act)


def test_what_is_written_while_a_conversation_is_read_stays_and_is_asked_in_it(tmp_path, monkeypatch):
    async def first(pilot):
        await answered(pilot, "what?")

    async def second(pilot):
        app = pilot.app
        restored = history_actions._restored

        def slow(turns):
            app.call_from_thread(written)
            return restored(turns)

        async def written():
            await app.send("and?")

        monkeypatch.setattr(history_actions, "_restored", slow)
        await app._resume(1)
        await until(pilot, lambda: len(app.conversation.exchanges) == 1 and not app.resuming)
        assert app.composer.text == "and?"
        await pilot.press("enter")
        await until(pilot, lambda: len(app.conversation.exchanges) == 2)
        await ended(pilot, last_exchange(pilot))

    played_chat(chat_app(history=tmp_path / "history.db"), first)
    played_chat(chat_app(history=tmp_path / "history.db"), second)


@pytest.mark.parametrize("editing", [False, True])
def test_what_was_written_is_there_again_where_a_conversation_cannot_be_read(tmp_path, monkeypatch, editing):
    def broken(turns):
        raise StorageError("the disk is gone")

    monkeypatch.setattr(history_actions, "_restored", broken)

    async def act(pilot):
        app = pilot.app
        await attach(pilot, A)
        await answered(pilot, "what?")
        if editing:
            await app.action_edit_last()
        else:
            app.composer.write("a draft")
            await attach(pilot, A)
        await app._resume(1)
        await until(pilot, lambda: "the disk is gone" in notes(app))
        await until(pilot, lambda: app.query_one(StatusLine).told.endswith("not resumed"))
        assert (app.composer.text, app.composer.editing) == (("what?", True) if editing else ("a draft", False))
        assert chips(app) == [A]

    played_chat(chat_app(history=tmp_path / "history.db"), act)


def test_the_picture_of_a_question_that_was_stopped_comes_with_the_next_one_on_another_day(tmp_path, photo):
    async def first(pilot):
        app = pilot.app
        for question in (f"what? @'{photo}'", "and?"):
            exchange = await ask(pilot, question)
            await pilot.press("escape")
            await ended(pilot, exchange)
            await until(pilot, lambda: len(chips(app)) == 1)

    async def second(pilot):
        app = pilot.app
        await app._resume(1)
        await until(pilot, lambda: len(app.conversation.exchanges) == 2 and chips(app))
        assert [each.path for each in chips(app)] == [photo]
        exchange = await answered(pilot, "now?")
        assert exchange.answer.tokens.image == 144
        await until(pilot, lambda: not chips(app))

    async def third(pilot):
        app = pilot.app
        await app._resume(1)
        await until(pilot, lambda: "the conversation goes on" in app.query_one(StatusLine).told)
        assert (len(app.conversation.exchanges), chips(app)) == (3, [])

    played_chat(chat_app(model=HOLDS, history=tmp_path / "history.db"), first)
    played_chat(chat_app(history=tmp_path / "history.db"), second)
    played_chat(chat_app(history=tmp_path / "history.db"), third)


@pytest.mark.parametrize(("ends", "told"), [("stopped", "stopped"), ("answered", "model answered")])
def test_a_question_that_is_taken_back_while_it_waits_leaves_what_is_told_of_the_one_before(ends, told):
    async def act(pilot):
        app = pilot.app
        bars = app.query_one(StageBars)
        first = await ask(pilot, "what?")
        await until(pilot, lambda: bars._stage == "decode")
        second = await ask(pilot, "and?")
        await app.action_undo()
        if ends == "stopped":
            await pilot.press("escape")
        else:
            app.engine.let_go()
        await ended(pilot, first)
        await until(pilot, lambda: app.log_view.answer(second.turn) is None)
        assert told in app.query_one(StatusLine).told
        assert bars.ms["decode"] > 0

    played_chat(chat_app(model=HOLDS), act)


def test_a_question_that_is_taken_back_before_a_new_chat_is_not_told_in_it(monkeypatch):
    free, gone = threading.Event(), []

    async def act(pilot):
        app = pilot.app
        taken_back = app.taken_back

        async def told(turn):
            await taken_back(turn)
            gone.append(turn)

        monkeypatch.setattr(app, "taken_back", told)
        await answered(pilot, "what?")
        app.conversation.call(lambda: free.wait(DEADLINE))
        await ask(pilot, "and?")
        await app.action_undo()
        await app.action_undo()
        await app.action_new_chat()
        free.set()
        await until(pilot, lambda: len(gone) == 2)
        assert app.query_one(StatusLine).told.endswith("new chat")

    played_chat(chat_app(), act)


def test_a_question_of_a_conversation_that_was_resumed_is_told_when_it_is_taken_back(tmp_path):
    async def first(pilot):
        await answered(pilot, "what?")

    async def second(pilot):
        app = pilot.app
        await app._resume(1)
        await until(pilot, lambda: len(app.conversation.exchanges) == 1 and not app.resuming)
        await app.action_undo()
        await until(pilot, lambda: app.query_one(StatusLine).told.endswith("taken back"))

    played_chat(chat_app(history=tmp_path / "history.db"), first)
    played_chat(chat_app(history=tmp_path / "history.db"), second)


def test_a_pair_that_there_is_not_leaves_the_one_that_is_open():
    def check(name):
        raise ModelNotFound(f"there is no pair {name!r}")

    async def act(pilot):
        app = pilot.app
        app.composer.write("/model typo")
        await pilot.press("enter")
        await until(pilot, lambda: "there is no pair 'typo'" in notes(app))
        assert app.composer.text == "/model typo"
        await answered(pilot, "what?")
        assert app.engine.alive

    played_chat(chat_app(check=check), act)


def test_a_new_chat_says_nothing_of_the_one_before():
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        await until(pilot, lambda: "The model answered" in shown(app))
        await app.action_new_chat()
        await until(pilot, lambda: "The model answered" not in shown(app))

    played_chat(chat_app(), act)
