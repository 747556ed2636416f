"""The settings screen: values are checked as the command line checks them, and come back typed."""

from __future__ import annotations

import pytest

from localvlm.pruning import IN_LLM, METHODS, Tokens
from localvlm.tui.screens.settings import ChatSettings, SettingsScreen
from localvlm.tui.themes import DARK, LIGHT
from tests.tui.stage import played, press, shown

NAMES = ("auto", *METHODS, *IN_LLM)


def change(*keys, settings=ChatSettings(), look=lambda app: None, size=(80, 24), preview=None):
    async def act(pilot):
        await press(pilot, *keys)
        look(pilot.app)

    screen = SettingsScreen(settings, NAMES, (DARK.name, LIGHT.name), calibrated=0.977, preview=preview)
    return played(screen, act, size)


def seen(*keys, **given):
    texts = []
    change(*keys, look=lambda app: texts.append(shown(app)), **given)
    return texts[0]


def clear():
    return ["end", "ctrl+u"]


def test_nothing_changed_is_no_change():
    for before in (ChatSettings(), ChatSettings("fastv", Tokens(64), 0.44, "off", 9, 0.5, "Be\nbrief.", "nord", True)):
        (change_of,) = change("ctrl+s", settings=before)
        assert change_of.changed == frozenset()
        assert change_of.after == before
    assert change("escape") == [None]


def test_values_come_back_typed():
    keys = ["tab", *clear(), "+0.5", "tab", *clear(), "+0.44", "tab", "tab", *clear(), "+99", "tab", *clear(), "+0.7",
            "tab", "+Be brief.", "ctrl+s"]  # fmt: skip
    (found,) = change(*keys)
    assert found.after == ChatSettings(keep=0.5, guide_keep=0.44, max_tokens=99, temp=0.7, system="Be brief.")
    assert found.changed == {"keep", "guide_keep", "max_tokens", "temp", "system"}


def test_methods_exits_and_privacy_are_chosen_by_name():
    (found,) = change("enter", "+fastv", "enter", "ctrl+s")
    assert found.after.method == "fastv"
    exits = ["tab"] * 3
    assert "as calibrated (0.977)" in seen()
    (found,) = change(*exits, "enter", "down", "enter", "ctrl+s")
    assert found.after.exit_at == "off"
    (found,) = change(*exits, "enter", "down", "down", "enter", "ctrl+s")
    assert found.after.exit_at == 0.0
    (found,) = change(*exits, "enter", "end", "enter", "tab", "+0.9", "ctrl+s")
    assert found.after.exit_at == 0.9
    (found,) = change(*exits, "enter", "home", "enter", "ctrl+s", settings=ChatSettings(exit_at=0.9))
    assert found.after.exit_at is None
    (found,) = change("shift+tab", "enter", "down", "enter", "ctrl+s")
    assert found.changed == {"private"}


def test_a_private_chat_offers_no_way_back():
    for keys in (["up"], ["home"]):
        (found,) = change("shift+tab", "enter", *keys, "enter", "ctrl+s", settings=ChatSettings(private=True))
        assert found.changed == frozenset()


@pytest.mark.parametrize(
    ("tabs", "typed", "told"),
    [
        (1, "35", "keep: '35' is not a share over 0 and up to 1. For 35 % write 0.35."),
        (1, "much", "keep: 'much' is neither a share such as 0.35 nor 'auto' or 'all'."),
        (2, "auto", "guide-keep: 'auto' goes by what the guide looks at; give a share such as 0.35, or 'all'."),
        (4, "0", "max-tokens: '0' is not a whole number from 1 up."),
        (4, "[red]", "max-tokens: '[red]' is not a valid integer."),
        (5, "-1", "temp: '-1' is not a number from 0 up."),
        (5, "nan", "temp: 'nan' is not a number from 0 up."),
    ],
)
def test_what_is_wrong_is_told_as_the_command_line_does_and_not_taken(tabs, typed, told):
    texts = []
    keys = [*["tab"] * tabs, *clear(), f"+{typed}", "ctrl+s"]
    assert change(*keys, look=lambda app: texts.append(shown(app)), size=(120, 24)) == []
    assert told in " ".join(texts[0].split())


def test_the_key_that_takes_them_does_not_claim_to_keep_them():
    assert "^s use in this chat" in (text := seen())
    assert "save" not in text


def test_a_score_that_is_wrong_is_told():
    keys = ["tab"] * 3 + ["enter", "end", "enter", "tab", "+1.5"]
    assert "exit-at: '1.5' is not a score from 0 to 1." in seen(*keys, size=(120, 24))


def test_themes_are_previewed_and_esc_takes_that_back():
    tried = []
    tabs = ["tab"] * 7
    change(*tabs, "enter", "down", "enter", "escape", preview=tried.append)
    assert tried[-2:] == [LIGHT.name, DARK.name]
    (found,) = change(*tabs, "enter", "down", "enter", "ctrl+s", preview=tried.append)
    assert found.after.theme == LIGHT.name


def test_all_of_it_can_be_reached_on_a_small_terminal():
    fields = set()

    async def act(pilot):
        for _ in range(12):
            focused = pilot.app.focused
            fields.add(focused.id)
            assert focused.region in pilot.app.screen.region, f"{focused.id} is scrolled into view"
            await press(pilot, "tab")

    played(SettingsScreen(ChatSettings(exit_at=0.9), NAMES, (DARK.name,)), act, (40, 12))
    choices = {"method", "exit", "theme", "private"}
    assert fields == choices | {"keep", "guide_keep", "score", "max_tokens", "temp", "system"}
