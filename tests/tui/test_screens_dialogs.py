"""Questions, texts to edit, the engine's death, and help: each by keys."""

from __future__ import annotations

import pytest
from textual.binding import Binding

from localvlm.tui.commands import COMMANDS
from localvlm.tui.keymap import KEYS
from localvlm.tui.screens.confirm import ConfirmScreen, EditScreen
from localvlm.tui.screens.help import HelpEntry, HelpScreen, HelpSection, bound, keyed, typed
from tests.tui.stage import SIZES, played, press, shown


def keys(screen, *given, size=(80, 24), look=lambda app: None):
    async def act(pilot):
        await press(pilot, *given)
        look(pilot.app)

    return played(screen, act, size)


@pytest.mark.parametrize(
    ("pressed", "answer"),
    [("y", True), ("n", False), ("escape", False), ("enter", False), ("left", None), ("right enter", True)],
)
def test_what_cannot_be_undone_is_done_only_if_somebody_says_so(pressed, answer):
    found = keys(ConfirmScreen("Delete [red]x\x1b[2J?", "Delete", "Keep", danger=True), *pressed.split())
    assert found == ([] if answer is None else [answer])


def test_other_questions_have_the_focus_on_yes():
    assert keys(ConfirmScreen("Pull it?", "Pull", "Not now"), "enter") == [True]


def test_a_text_is_edited():
    assert keys(EditScreen("Rename", "old"), "ctrl+u", "+ new name ", "enter") == ["new name"]
    assert keys(EditScreen("Rename", "old\nname"), "enter") == ["old name"]
    assert keys(EditScreen("Rename", "old"), "ctrl+u", "enter") == []
    assert keys(EditScreen("Edit", "old", empty=True), "ctrl+u", "enter") == [""]
    assert keys(EditScreen("Rename", "old"), "+x", "escape") == [None]


SECTIONS = [HelpSection("Keys", keyed(KEYS)), HelpSection("Commands", typed(COMMANDS))]


@pytest.mark.parametrize("size", SIZES)
def test_every_key_and_command_can_be_found(size):
    """At 40 columns too: one by one, by what is written of it."""

    async def act(pilot):
        for entry in (*SECTIONS[0].entries[:2], *SECTIONS[1].entries[:2]):
            await press(pilot, "ctrl+u", f"+{entry.what[:24]}")
            text = " ".join(shown(pilot.app).split())
            assert entry.keys.split()[0] in text
        await press(pilot, "ctrl+u", "+zebra")
        assert "no key and no command is like that" in " ".join(shown(pilot.app).split())

    assert played(HelpScreen(SECTIONS), act, size) == []


def test_arrows_scroll_help_while_one_types():
    async def act(pilot):
        assert COMMANDS[-1].usage not in shown(pilot.app)
        await press(pilot, *["pagedown"] * 6)
        assert COMMANDS[-1].usage in shown(pilot.app)
        await press(pilot, "f1")

    assert played(HelpScreen(SECTIONS), act, (40, 12)) == [None]


def test_keys_are_told_as_bindings_and_the_users_keymap_have_them():
    bindings = [Binding("enter", "send", "send", id="send"), Binding("ctrl+j,shift+enter", "line", "new line", id="nl"),
                ("f9", "nine", "nine"), Binding("x", "hide", "hidden", show=False)]  # fmt: skip
    assert bound(bindings) == [
        HelpEntry("enter", "send"), HelpEntry("ctrl+j, shift+enter", "new line"), HelpEntry("f9", "nine")
    ]  # fmt: skip
    assert bound(bindings, {"send": "ctrl+d"}, hidden=True)[0] == HelpEntry("ctrl+d", "send")
    assert HelpEntry("x", "hidden") in bound(bindings, hidden=True)
    assert keyed(KEYS[:1], {KEYS[0].name: "f5,f6"})[0].keys == "f5, f6"
