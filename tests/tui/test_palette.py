"""The command palette offers the slash commands: the same list, found by name or by what they do."""

from __future__ import annotations

import asyncio

import pytest
from textual.app import App, SystemCommand

from localvlm.tui.commands import ALIASES, COMMANDS, Command
from localvlm.tui.palette import CommandProvider
from tests.tui.stage import press, settled, shown


class Palette(App[None]):
    COMMANDS = {CommandProvider}

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Command] = []
        self.themed = 0

    def get_system_commands(self, screen):
        yield SystemCommand("Theme", "changes the colours", self.theme_chosen)

    def theme_chosen(self) -> None:
        self.themed += 1

    def choose_command(self, command: Command) -> None:
        self.chosen.append(command)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("undo", "undo"),
        ("another answer", "regen"),
        ("takes nothing", None),
        *ALIASES.items(),
        ("conversations", "resume"),
        ("rename", "resume"),
        ("new chat", "clear"),
        ("switch pair", "model"),
        ("pair changes", "model"),
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


@pytest.mark.parametrize("typed", ["colors", "colours", "change theme"])
def test_what_the_app_itself_has_is_found_by_its_words(typed):
    app = Palette()

    async def play():
        async with app.run_test(size=(80, 40)) as pilot:
            await press(pilot, "ctrl+p", f"+{typed}")
            assert "changes the colours" in shown(app)
            await press(pilot, "enter")

    asyncio.run(play())
    assert app.themed == 1
