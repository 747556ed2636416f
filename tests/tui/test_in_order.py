"""Keys that are pressed faster than the app takes them act in their order."""

from __future__ import annotations

import pytest

from tests.tui.chat_app import chat_app, last_exchange, played_chat, pressed_at_once, until

NAMES = {"\n": "ctrl+j", "\r": "enter", "\x7f": "backspace", "\x15": "ctrl+u", "\x17": "ctrl+w", "\x01": "home"}


def pressed(app, keys):
    pressed_at_once(app, *(NAMES.get(key, key) for key in keys))


@pytest.mark.parametrize(
    ("keys", "text"),
    [("x\x7fy", "y"), ("abc\x15d", "d"), ("ab\ncd", "ab\ncd"), ("b\x01a", "ab"), ("one two\x17three", "one three")],
)
def test_a_key_behind_another_acts_behind_it(keys, text):
    async def act(pilot):
        pressed(pilot.app, keys)
        await until(pilot, lambda: pilot.app.composer.text == text)

    played_chat(chat_app(), act)


def test_enter_sends_all_that_was_typed_before_it():
    async def act(pilot):
        pressed(pilot.app, "wxyz\x7f?\r")
        await until(pilot, lambda: pilot.app.conversation.exchanges)
        assert last_exchange(pilot).question == "wxy?"

    played_chat(chat_app(), act)


def test_lines_of_screens_take_keys_in_order():
    async def act(pilot):
        await pilot.press("f1")
        pressed(pilot.app, "x\x7fy")
        line = pilot.app.screen.query_one("Line")
        await until(pilot, lambda: line.value == "y")

    played_chat(chat_app(), act)
