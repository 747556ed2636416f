"""While a dialog is open its keys are those that act, not those of the chat below it."""

from __future__ import annotations

import pytest

from localvlm.tui.keymap import KEYS
from localvlm.tui.screens.confirm import ConfirmScreen
from localvlm.tui.screens.help import HelpScreen
from localvlm.tui.screens.history import HistoryScreen
from localvlm.tui.screens.images import ImageBrowser
from tests.tui.chat_app import answered, attach, chat_app, played_chat, until
from tests.tui.chatting import picture
from tests.tui.stage import idle, shown

PRESSED = [key.keys for key in KEYS if key.name not in ("cancel", "quit")]


@pytest.mark.parametrize("dialog", ["History", "Delete?", "palette"])
def test_keys_of_the_chat_do_nothing_under_a_dialog(tmp_path, dialog):
    async def act(pilot):
        app = pilot.app
        exchange = await answered(pilot, "what?")
        await attach(pilot, picture())
        app.composer.write("a draft")
        await pilot.press("ctrl+p" if dialog == "palette" else "ctrl+r")
        await until(pilot, lambda: app.screen.is_modal)
        if dialog != "palette":
            await until(pilot, lambda: isinstance(app.screen, HistoryScreen) and "what?" in shown(app))
        if dialog == "Delete?":
            await pilot.press("down", "d")
            await until(pilot, lambda: isinstance(app.screen, ConfirmScreen))
        open_before = app.screen_stack
        for key in PRESSED:
            await pilot.press(key)
            await idle(pilot)
        assert app.screen_stack == open_before
        for _ in open_before[1:]:
            await pilot.press("escape")
        await until(pilot, lambda: not app.screen.is_modal)
        assert app.conversation.exchanges == [exchange]
        assert (app.composer.text, len(app.query("Chip"))) == ("a draft", 1)

    played_chat(chat_app(history=tmp_path / "history.db"), act)


@pytest.mark.parametrize("key", ["f1", "f9"])
def test_the_key_that_opens_the_help_closes_it(key):
    async def act(pilot):
        await pilot.press(key)
        await until(pilot, lambda: isinstance(pilot.app.screen, HelpScreen))
        await pilot.press(key)
        await until(pilot, lambda: len(pilot.app.screen_stack) == 1)

    played_chat(chat_app(keymap={} if key == "f1" else {"help": key}), act)


def test_a_key_that_the_user_gave_to_the_chat_is_a_dialogs_own_while_that_is_open():
    """As the README's example has it."""

    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, ImageBrowser))
        await pilot.press("ctrl+t")
        await until(pilot, lambda: app.screen.place.hidden)
        assert len(app.conversation.exchanges) == 1
        await pilot.press("escape", "ctrl+t")
        await until(pilot, lambda: not app.conversation.exchanges)

    played_chat(chat_app(keymap={"new-chat": "ctrl+t"}), act)


def test_the_chat_can_be_left_from_a_dialog():
    app = chat_app()

    async def act(pilot):
        await pilot.press("f4")
        await until(pilot, lambda: app.screen.is_modal)
        await pilot.press("ctrl+q")

    played_chat(app, act)
    assert app.return_code == 0
