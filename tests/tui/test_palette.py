"""The command palette offers the slash commands: the same list, found by name or by what they do."""

from __future__ import annotations

import asyncio

import pytest
from textual.app import App

from localvlm.tui.commands import ALIASES, COMMANDS, Command
from localvlm.tui.palette import CommandProvider
from tests.tui.stage import press, settled, shown


class Palette(App[None]):
    COMMANDS = {CommandProvider}

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Command] = []

    def choose_command(self, command: Command) -> None:
        self.chosen.append(command)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("undo", "undo"),
        ("another answer", "regen"),
        ("takes nothing", None),
        *ALIASES.items(),
        ("tlq", None),  # "takes the last question back"
    ],
)
def test_a_command_is_found_and_chosen(typed, name):
    app = Palette()

    async def play():
        async with app.run_test(size=(80, 40)) as pilot:
            await press(pilot, "ctrl+p")
            text = shown(app)
            assert all(command.usage in text for command in COMMANDS[:4])
            assert "[PAIR]" in text, "brackets are no markup"
            await press(pilot, f"+{typed}", "enter")
            await settled(pilot)

    asyncio.run(play())
    assert [command.name for command in app.chosen] == ([name] if name else [])
