"""The chat, driven by keys on the fake engine."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from textual.events import Click
from textual.selection import SELECT_ALL
from textual.widgets import TextArea

from localvlm.answers import AskOptions
from localvlm.engine.fake import Script
from localvlm.errors import StorageError
from localvlm.history import History
from localvlm.tui import display
from localvlm.tui.screens.help import HelpScreen
from localvlm.tui.screens.history import HistoryScreen
from localvlm.tui.screens.images import ImageBrowser
from localvlm.tui.screens.settings import SettingsScreen
from localvlm.tui.widgets.chips import Chip, Chips
from localvlm.tui.widgets.composer import Composer, Prompt
from localvlm.tui.widgets.message import AnswerMessage, Question
from localvlm.tui.widgets.retention_slider import RetentionSlider
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
from tests.tui.chatting import DEADLINE, HELD, picture
from tests.tui.stage import idle, press, shown

SLOW = Script("dark " * 200, token_s=0.2)
"""Of an answer that is to be stopped before its end."""


def test_a_question_is_typed_and_answered():
    async def act(pilot):
        await attach(pilot, picture())
        await pilot.press(*"what?", "enter")
        await until(pilot, lambda: pilot.app.conversation.exchanges)
        await ended(pilot, last_exchange(pilot))
        screen = shown(pilot.app)
        for said in (
            "what?",
            "1.png 60\u00d740",
            "dark red",
            "model · 50 of 144 tokens (35%)",
            "the model replaced it",
        ):
            assert said in screen
        assert not pilot.app.query(Chip)
        assert pilot.app.query_one(Composer).text == ""

    played_chat(chat_app(), act)


def test_the_guides_draft_is_shown_at_once_and_its_fate_told():
    async def act(pilot):
        await attach(pilot, picture())
        exchange = await ask(pilot, "what?")
        await until(pilot, lambda: "draft: red" in shown(pilot.app))
        pilot.app.engine.let_go()
        await until(pilot, lambda: "the model replaced it" in shown(pilot.app))
        await pilot.press("escape")
        await ended(pilot, exchange)

    played_chat(chat_app(model=replace(SLOW, encode_s=HELD)), act)


@pytest.mark.parametrize(
    ("said", "told"),
    [("red", "✓ confirms the draft"), ("red, dark", "✓ goes on from the draft"), ("blue", "the model replaced it")],
)
def test_what_the_model_makes_of_the_draft_is_told(said, told):
    async def act(pilot):
        await attach(pilot, picture())
        await answered(pilot, "what?")
        assert told in shown(pilot.app)

    played_chat(chat_app(model=Script(said)), act)


@pytest.mark.parametrize("how", ["stopped", "died"])
def test_a_draft_whose_model_says_no_more_is_left_as_it_was(how):
    script = Script("dark red", encode_s=HELD) if how == "stopped" else Script("dark red", crash_at=1)

    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        exchange = await ask(pilot, "what?")
        if how == "stopped":
            await until(pilot, lambda: "draft: red \u00b7 the model is asked" in shown(app))
            await pilot.press("escape")
        await ended(pilot, exchange)
        assert "the guide's draft was: red" in shown(app)
        assert "the model" not in shown(app)

    played_chat(chat_app(model=script), act)


def test_a_guide_that_says_nothing_has_no_draft():
    async def act(pilot):
        await attach(pilot, picture())
        await answered(pilot, "what?")
        assert "draft was" not in shown(pilot.app)
        assert "replaced" not in shown(pilot.app)

    played_chat(chat_app(guide=Script(" ")), act)


def test_an_answer_of_the_guide_says_why_it_is_final():
    async def act(pilot):
        await attach(pilot, picture())
        score = (await answered(pilot, "what?")).answer.score.combined
        assert f"guide · sure enough: {score:.2f} ≥ 0.50" in shown(pilot.app)
        assert "none to the model" in pilot.app.query_one(StatusLine).told

    played_chat(chat_app(options=AskOptions(exit_at=0.5)), act)


def test_escape_stops_an_answer_and_r_asks_again():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        exchange = await ask(pilot, "what?")
        await until(pilot, lambda: exchange.text != "")
        await pilot.press("escape")
        await ended(pilot, exchange)
        assert "stopped" in shown(app)
        assert [chip.attached.image.name for chip in app.query(Chip)] == ["1.png"]
        for vlm in app.engine.loaded:
            vlm._script = replace(vlm._script, answer="dark red", token_s=0.0)
        app.query(AnswerMessage).last().focus()
        await pilot.press("r")
        await until(
            pilot, lambda: len(app.query(AnswerMessage)) == 1 and app.conversation.exchanges[-1].status == "done"
        )
        assert not app.query(Chip)
        assert app.conversation.exchanges[-1].images[0].name == "1.png"

    played_chat(chat_app(model=SLOW), act)


@pytest.mark.parametrize("focused", [Prompt, RetentionSlider])
def test_a_click_on_an_answer_leaves_the_keys_to_the_text(focused):
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        app.query_one(focused).focus()
        await pilot.click(AnswerMessage)
        await press(pilot, "+are")
        assert app.composer.text == "are"
        assert [e.question for e in app.conversation.exchanges] == ["what?"]

    played_chat(chat_app(), act)


def test_letters_that_do_nothing_with_a_message_go_to_the_text():
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        app.query(AnswerMessage).last().focus()
        pressed_at_once(app, *"is there!", "backspace")
        await until(pilot, lambda: app.composer.text == "is there")
        assert app.focused is app.composer.prompt
        assert len(app.conversation.exchanges) == 1

    played_chat(chat_app(), act)


def test_ctrl_c_copies_what_is_selected_in_an_answer_and_stops_nothing(monkeypatch):
    copied: list[str] = []

    async def act(pilot):
        app = pilot.app
        monkeypatch.setattr(app, "copy", copied.append)
        await ask(pilot, "what?")
        question = app.query(Question).first().query_one(".question")
        app.screen.selections = {question: SELECT_ALL}
        await pilot.press("ctrl+c")
        assert copied == ["what?"]
        assert app.conversation.busy
        await pilot.press("ctrl+c")
        await until(pilot, lambda: not app.conversation.busy)
        assert copied == ["what?"]

    played_chat(chat_app(model=Script("dark red", token_s=HELD)), act)


def test_a_selection_in_an_answer_leaves_the_keys_where_they_were():
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        app.query_one(RetentionSlider).focus()
        await pilot.mouse_down(AnswerMessage, offset=(4, 0))
        await pilot.hover(AnswerMessage, offset=(9, 0))
        await pilot.mouse_up(AnswerMessage, offset=(9, 0))
        await pilot._post_mouse_events([Click], AnswerMessage, (9, 0))  # of a terminal it would follow by itself
        await idle(pilot)
        assert app.screen.get_selected_text()
        assert app.focused is app.query_one(RetentionSlider)

    played_chat(chat_app(), act)


def test_the_keys_told_below_a_cut_answer_copy_all_of_it(monkeypatch):
    copied: list[str] = []
    monkeypatch.setattr(display, "MOST", 5)

    async def act(pilot):
        app = pilot.app
        monkeypatch.setattr(app, "copy", copied.append)
        await answered(pilot, "what?")
        assert "3 characters more: shift+tab, then c copies all" in " ".join(shown(app).split())
        await press(pilot, "shift+tab", "c")
        assert copied == ["dark red"]

    played_chat(chat_app(), act)


def test_the_key_that_asks_again_is_told_of_the_last_turn_alone():
    async def act(pilot):
        app = pilot.app
        for question in ("what?", "and?"):
            exchange = await ask(pilot, question)
            await pilot.press("escape")
            await ended(pilot, exchange)
        assert shown(app).count("stopped \u00b7") == 1
        assert shown(app).count("ctrl+b asks again") == 1
        await press(pilot, "ctrl+b")
        await until(pilot, lambda: app.conversation.busy and len(app.query(AnswerMessage)) == 2)
        assert "asks again" not in shown(app)

    played_chat(chat_app(model=Script("dark red", token_s=HELD), keymap={"regenerate": "ctrl+b"}), act)


def test_escape_leaves_an_edit_before_it_stops_the_answer():
    async def act(pilot):
        app = pilot.app
        exchange = await ask(pilot, "what?")
        await pilot.press("up")
        await until(pilot, lambda: app.composer.editing)
        await pilot.press("escape")
        await until(pilot, lambda: not app.composer.editing)
        assert (app.composer.text, exchange.status, app.conversation.busy) == ("", "waiting", True)
        await pilot.press("escape")
        await ended(pilot, exchange)
        assert exchange.status == "interrupted"

    played_chat(chat_app(model=Script("dark red", token_s=HELD)), act)


def test_ctrl_c_takes_a_question_back_that_waits_for_its_picture():
    async def act(pilot):
        app = pilot.app
        chips, read = app.query_one(Chips), threading.Event()
        app._read(await chips.begin("slow.png"), lambda: [picture()] if read.wait(DEADLINE) else [])
        app.composer.write("what?")
        await pilot.press("enter")
        await until(pilot, lambda: app._waits == "what?")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: app.query_one(StatusLine).told.endswith("not asked yet"))
        assert not notes(app)
        read.set()
        await until(pilot, lambda: not chips.reading)
        await press(pilot, "!")
        assert (app.composer.text, app.conversation.exchanges) == ("what?!", [])

    played_chat(chat_app(), act)


@pytest.mark.parametrize("how", ["f2", "smaller"])
def test_a_panel_that_goes_leaves_the_keys_to_the_text(how):
    async def act(pilot):
        app = pilot.app
        app.query_one(RetentionSlider).focus()
        await idle(pilot)
        if how == "f2":
            await pilot.press("f2")
        else:
            await pilot.resize_terminal(70, 24)
        await until(pilot, lambda: not app.query_one("#side").display)
        await press(pilot, "+hi")
        assert app.composer.text == "hi"

    played_chat(chat_app(), act, (100, 30))


def test_what_is_told_twice_is_shown_once_above_the_text_until_escape():
    async def act(pilot):
        app = pilot.app
        for _ in range(2):
            app.composer.write("/regan")
            await pilot.press("enter")
            await until(pilot, lambda: "did you mean /regen?" in notes(app))
        await until(pilot, lambda: "did you mean /regen?" in shown(app))
        [toast] = app.screen.query("Toast")
        assert toast.region.bottom <= app.composer.region.y
        assert toast.region.y <= 1
        await pilot.press("escape")
        await until(pilot, lambda: not app.screen.query("Toast"))

    played_chat(chat_app(), act, (70, 24), toasts=True)


def test_up_in_an_empty_text_edits_the_last_question():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        await pilot.press("up")
        await until(pilot, lambda: app.composer.editing)
        assert (app.composer.text, len(app.query(Chip))) == ("what?", 1)
        await pilot.press(*" now", "enter")
        await until(pilot, lambda: [e.question for e in app.conversation.exchanges] == ["what? now"])
        await ended(pilot, app.conversation.exchanges[-1])
        await until(pilot, lambda: len(app.query(Question)) == 1)
        assert [turn.question for turn in app.conversation._session.turns] == ["what? now"]
        await pilot.press("up")
        await until(pilot, lambda: app.composer.editing)
        await pilot.press("escape")
        await until(pilot, lambda: (app.composer.editing, app.composer.text, len(app.query(Chip))) == (False, "", 0))

    played_chat(chat_app(), act)


def test_lines_are_broken_by_ctrl_j_and_shift_enter():
    async def act(pilot):
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
        await until(pilot, lambda: pilot.app.composer.text == "a\nb\nc")

    played_chat(chat_app(), act)


def test_commands_say_what_they_may_become_and_what_is_wrong():
    async def act(pilot):
        app = pilot.app
        await pilot.press("slash", "r", "e")
        assert "asks the last question again" in shown(app)
        await pilot.press("tab")
        assert app.composer.text == "/regen "
        app.composer.write("/regan")
        await pilot.press("enter")
        await until(pilot, lambda: "did you mean /regen?" in notes(app))
        assert app.composer.text == "/regan"
        app.composer.write("/keep 0.1")
        await pilot.press("enter")
        await until(pilot, lambda: app.options.keep == 0.1)
        app.composer.write("/keep eleven")
        await pilot.press("enter")
        await until(pilot, lambda: "eleven" in notes(app))
        app.composer.write("/method grid")
        await pilot.press("enter")
        await until(pilot, lambda: app.options.method == "grid")
        app.composer.write("/system Be brief.")
        await pilot.press("enter")
        await until(pilot, lambda: app.options.system == "Be brief.")
        await attach(pilot, picture())
        exchange = await answered(pilot, "what?")
        assert (exchange.options.keep, exchange.options.method, exchange.options.system) == (0.1, "grid", "Be brief.")
        app.composer.write("/stats")
        await pilot.press("enter")
        await until(pilot, lambda: "14 of 144 tokens" in notes(app))

    played_chat(chat_app(), act)


@pytest.mark.parametrize(
    ("written", "told"), [("/keep abc", "'abc' is neither a share"), ("/method nosuch", "no method 'nosuch'")]
)
def test_a_command_that_is_not_taken_is_there_to_be_mended(written, told):
    async def act(pilot):
        app = pilot.app
        before = app.options
        await pilot.press(*written, "enter")
        await until(pilot, lambda: told in notes(app))
        assert (app.composer.text, app.options) == (written, before)

    played_chat(chat_app(), act)


def test_the_slider_changes_the_next_question():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        app.query_one(RetentionSlider).focus()
        await pilot.press("right")
        await until(pilot, lambda: app.options.keep > 0.35)
        exchange = await answered(pilot, "what?")
        assert exchange.options.keep == app.options.keep

    played_chat(chat_app(), act)


def test_tokens_that_a_question_before_brought_are_told():
    """A smaller share keeps them all the same."""

    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        assert "from before" not in shown(app)
        app.composer.write("/keep 0.1")
        await pilot.press("enter")
        await until(pilot, lambda: app.options.keep == 0.1)
        exchange = await answered(pilot, "and?")
        assert exchange.answer.earlier == 50
        assert "of 144 tokens (35%), 50 of them from before" in shown(app)
        assert "50 of them from before." in " ".join(str(app.query_one("#saw-verdict").content).split())

    played_chat(chat_app(), act)


def test_undo_gives_the_question_back():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        app.composer.write("/undo")
        await pilot.press("enter")
        await until(pilot, lambda: not app.query(Question))
        assert (app.composer.text, len(app.query(Chip))) == ("what?", 1)
        assert app.conversation.exchanges == []

    played_chat(chat_app(), act)


def test_a_new_chat_begins_with_nothing():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        await pilot.press("ctrl+n")
        await until(pilot, lambda: not app.query(Question))
        assert "Ask a picture." in shown(app)
        exchange = await answered(pilot, "and now?")
        assert exchange.answer.tokens.image == 0

    played_chat(chat_app(), act)


@pytest.mark.parametrize(
    ("key", "screen"), [("f1", HelpScreen), ("ctrl+o", ImageBrowser), ("ctrl+r", HistoryScreen), ("f4", SettingsScreen)]
)
def test_keys_open_screens_and_escape_closes_them(tmp_path, key, screen):
    async def act(pilot):
        await pilot.press(key)
        await until(pilot, lambda: isinstance(pilot.app.screen, screen))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, screen))
        assert isinstance(pilot.app.focused, TextArea)

    played_chat(chat_app(history=tmp_path / "history.db"), act)


def test_keys_of_the_user_take_the_place_of_others():
    async def act(pilot):
        text = shown(pilot.app)
        assert "F9 help" in text
        assert "F9 helps" in text
        assert "ctrl+t  asks;" in text
        assert "F1" not in text
        await pilot.press("f1")
        assert not isinstance(pilot.app.screen, HelpScreen)
        await pilot.press("f9")
        await until(pilot, lambda: isinstance(pilot.app.screen, HelpScreen))
        await until(pilot, lambda: "f9" in shown(pilot.app))
        await pilot.press("escape")
        await pilot.press("a", "ctrl+t")
        await until(pilot, lambda: len(pilot.app.conversation.exchanges) == 1)

    played_chat(chat_app(keymap={"help": "f9", "send": "ctrl+t"}), act)


def test_ctrl_q_leaves_with_zero_while_an_answer_runs():
    app = chat_app(model=SLOW)

    async def act(pilot):
        await attach(pilot, picture())
        exchange = await ask(pilot, "what?")
        await until(pilot, lambda: exchange.text != "")
        await pilot.press("ctrl+q")

    played_chat(app, act)
    assert app.return_code == 0
    assert not app.engine.alive


# ---- history -----------------------------------------------------------------------------------------------------


def test_turns_are_kept_and_a_conversation_is_resumed(tmp_path, photo):
    path = tmp_path / "history.db"

    async def first(pilot):
        exchange = await ask(pilot, f"what? @'{photo}'")
        await ended(pilot, exchange)
        await answered(pilot, "and?")

    async def second(pilot):
        app = pilot.app
        await pilot.press("ctrl+r")
        await until(pilot, lambda: isinstance(app.screen, HistoryScreen) and "what?" in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: len(app.query(AnswerMessage)) == 2)
        exchange = await answered(pilot, "and now?")
        assert exchange.answer.tokens.image == 144
        assert [t.question for t in app.conversation._session.turns] == ["what?", "and?", "and now?"]

    played_chat(chat_app(history=path), first)
    played_chat(chat_app(history=path), second)
    with History.open(path) as history:
        (conversation,) = history.conversations()
        turns = history.turns(conversation.id)
    assert [(t.question, t.answer, t.status) for t in turns] == [
        ("what?", "dark red", "done"), ("and?", "dark red", "done"), ("and now?", "dark red", "done")
    ]  # fmt: skip
    assert turns[0].images[0].path == photo


def test_a_resumed_conversation_whose_picture_is_gone_goes_on_without_it(tmp_path, photo):
    path = tmp_path / "history.db"

    async def first(pilot):
        await ended(pilot, await ask(pilot, f"what? @'{photo}'"))

    async def second(pilot):
        app = pilot.app
        await app._resume(1)
        await until(pilot, lambda: len(app.query(AnswerMessage)) == 1)
        assert "does not exist" in notes(app)
        assert "goes on, without 1 of its pictures" in app.query_one(StatusLine).told
        assert (await answered(pilot, "and?")).answer.tokens.image == 0

    played_chat(chat_app(history=path), first)
    photo.unlink()
    played_chat(chat_app(history=path), second)


def test_private_writes_nothing(tmp_path):
    path = tmp_path / "history.db"

    async def act(pilot):
        app = pilot.app
        await answered(pilot, "known?")
        app.composer.write("/private")
        await pilot.press("enter")
        await until(pilot, lambda: "private" in app.query_one(StatusLine).told)
        await answered(pilot, "secret?")

    played_chat(chat_app(history=path), act)
    with History.open(path) as history:
        assert [c.title for c in history.conversations()] == ["known?"]


def test_a_history_that_cannot_be_written_is_told_and_the_answer_stays():
    app = chat_app(history=None)

    def full():
        raise StorageError("the disk is full", "free some")

    from localvlm.tui.recorder import HistoryRecorder

    app.recorder = app.conversation._recorder = HistoryRecorder(full)

    async def act(pilot):
        await answered(pilot, "what?")
        await until(pilot, lambda: "the disk is full" in notes(app))
        assert "red" in shown(app)

    played_chat(app, act)


# ---- the engine dies ---------------------------------------------------------------------------------------------


def test_an_engine_that_dies_is_told_started_again_and_nothing_is_lost():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        model = next(vlm for vlm in app.engine.loaded if vlm.info.name == "model")
        model._script = replace(model._script, crash_at=model._steps + 3)
        exchange = await ask(pilot, "and?")
        await ended(pilot, exchange)
        assert "was ended by SIGABRT" in shown(app)
        await until(pilot, lambda: "runs again" in notes(app))
        app.composer.write("/regen")
        await pilot.press("enter")
        await until(pilot, lambda: app.conversation.exchanges[-1].status == "done")
        assert [t.question for t in app.conversation._session.turns] == ["what?", "and?"]

    played_chat(chat_app(), act)


# ---- room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 12), (60, 20), (100, 30), (300, 80)])
def test_everything_has_room(size):
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture())
        await answered(pilot, "what?")
        for widget in (app.composer, app.query_one(StatusLine), app.log_view):
            assert widget.region.width > 0
            assert widget.region.height > 0
            assert app.screen.region.contains_region(widget.region)
        side = app.query_one("#side")
        assert side.display == (size[0] >= 100)
        await pilot.press("f2")
        await until(pilot, lambda: side.display == (size[0] < 100))
        await pilot.press("f2")
        await until(pilot, lambda: app.composer.display)

    played_chat(chat_app(), act, size)


@pytest.mark.parametrize("keys", [["ctrl+l"], ["escape"], ["ctrl+n"], ["f2"], ["ctrl+p", *"/keep", "enter"]])
def test_where_the_panel_is_alone_whatever_leads_to_the_text_shows_it(keys):
    async def act(pilot):
        app = pilot.app
        side = app.query_one("#side")
        await pilot.press("f2")
        await until(pilot, lambda: side.display and not app.composer.region)
        await pilot.press("a")
        assert app.composer.text == ""
        await press(pilot, *keys)
        await until(pilot, lambda: app.focused is app.composer.prompt)
        await until(pilot, lambda: not side.display and app.composer.region.area > 0)
        await pilot.press("f2")
        await until(pilot, lambda: side.display and not app.composer.region)

    played_chat(chat_app(), act, (70, 24))
