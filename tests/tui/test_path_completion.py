"""Completion of ``@`` paths below a text, driven by the keys that the text's widget hands on."""

from __future__ import annotations

import asyncio

import pytest
from textual.app import App, ComposeResult
from textual.widgets import Input

from localvlm.tui.widgets.path_completion import PathCompletion
from tests.tui.stage import press, settled


class Line(Input):
    """Hands its keys to the completion first, as the composer does."""

    async def _on_key(self, event):
        if self.app.query_one(PathCompletion).press(event.key, self.cursor_position):
            event.stop()
            event.prevent_default()
        else:
            await super()._on_key(event)


class Writing(App[None]):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.sent = folder, []

    def compose(self) -> ComposeResult:
        yield Line()
        yield PathCompletion(self.folder)

    def on_input_changed(self, event):
        self.query_one(PathCompletion).look(event.value[: event.input.cursor_position])

    def on_input_submitted(self, event):
        self.sent.append(event.value)

    def on_path_completion_taken(self, event):
        line = self.query_one(Line)
        line.value = line.value[: event.start] + event.text + line.value[event.end :]
        line.cursor_position = event.start + len(event.text)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat.png", "car.jpg", "my photo.png", "[red].png"):
        (tmp_path / name).touch()
    (tmp_path / "old things").mkdir()
    (tmp_path / "old things" / "dog.png").touch()
    return tmp_path


def wrote(folder, *keys):
    app = Writing(folder)
    found = []

    async def play():
        async with app.run_test() as pilot:
            await press(pilot, *keys)
            await settled(pilot)
            completion = app.query_one(PathCompletion)
            found.extend([app.query_one(Line).value, completion.open, [str(o.prompt) for o in completion.options]])

    asyncio.run(play())
    return found


def test_it_opens_with_an_at_and_tab_takes(folder):
    assert wrote(folder, "+see @ca") == ["see @ca", True, ["car.jpg", "cat.png"]]
    assert wrote(folder, "+see @ca", "down", "tab")[:2] == ["see @cat.png ", False]
    assert wrote(folder, "+@ca", "enter")[:2] == ["@car.jpg ", False]
    assert wrote(folder, "+me@ca")[1] is False
    assert wrote(folder, "+@zebra")[1] is False


def test_spaces_are_quoted_and_folders_go_on(folder):
    assert wrote(folder, "+@my", "tab")[0] == "@'my photo.png' "
    assert wrote(folder, "+@old", "tab") == ["@'old things/", True, ["old things/dog.png"]]
    assert wrote(folder, "+@old", "tab", "tab")[0] == "@'old things/dog.png' "
    assert wrote(folder, "+@red", "tab")[0] == "@[red].png ", "no markup"


def test_escape_closes_it_until_another_at(folder):
    assert wrote(folder, "+@c", "escape")[:2] == ["@c", False]
    assert wrote(folder, "+@c", "escape", "+a")[:2] == ["@ca", False]
    assert wrote(folder, "+@c", "escape", "+ and @ca")[1] is True


def test_enter_sends_where_a_name_is_written_out(folder):
    app = Writing(folder)

    async def play():
        async with app.run_test() as pilot:
            await press(pilot, "+@car.jpg", "enter")

    asyncio.run(play())
    assert app.sent == ["@car.jpg"]
