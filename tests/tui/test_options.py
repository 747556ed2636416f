"""What questions are asked with: what was said in the chat, and of all else what the pair has it be."""

from __future__ import annotations

import pytest

from localvlm.answers import AskOptions
from localvlm.catalog import Entry
from localvlm.engine.fake import Script
from localvlm.errors import NotEnoughMemory
from localvlm.pipeline import Pipeline
from localvlm.ranking import Ranked
from localvlm.tui.screens.confirm import ConfirmScreen
from localvlm.tui.screens.settings import SettingsScreen
from localvlm.tui.widgets.saw_panel import SawPanel
from localvlm.tui.widgets.status_line import StatusLine
from tests.tui.chat_app import answered, chat_app, notes, played_chat, until
from tests.tui.chatting import pair_of
from tests.tui.stage import press, shown

OWN = {None: AskOptions("sgl+", exit_at=0.8), "other": AskOptions("none", exit_at=None)}
"""Of a pair that is calibrated, and of one that is not and has no guide."""


def two_pairs():
    app = chat_app(guide=Script("red"))

    def opener(name, private, *, anyway=False):
        return Pipeline.open(pair_of(name), engine=app.engine), OWN[name]

    app.conversation._opener = opener
    return app


async def switched(pilot):
    await pilot.app.action_switch_pair("other")
    await until(pilot, lambda: pilot.app.query_one(StatusLine).pair == "other")


async def exit_chosen(pilot, *keys):
    await pilot.press("f4")
    await until(pilot, lambda: isinstance(pilot.app.screen, SettingsScreen))
    await press(pilot, "tab", "tab", "tab", "enter", *keys, "enter", "ctrl+s")
    await until(pilot, lambda: not pilot.app.screen.is_modal)


def test_an_exit_as_calibrated_is_that_of_each_pair():
    async def act(pilot):
        app = pilot.app
        await exit_chosen(pilot, "down")
        assert app.options.exit_at is None
        await exit_chosen(pilot, "home")
        assert app.options.exit_at == 0.8
        await switched(pilot)
        assert app.options.exit_at is None
        assert (await answered(pilot, "what?")).options.exit_at is None

    played_chat(two_pairs(), act)


def test_an_exit_that_was_named_goes_over():
    async def act(pilot):
        await exit_chosen(pilot, "down", "down")
        await switched(pilot)
        assert (await answered(pilot, "what?")).options.exit_at == 0.0

    played_chat(two_pairs(), act)


def test_method_auto_is_that_of_each_pair():
    async def act(pilot):
        app = pilot.app
        for said, method in (("grid", "grid"), ("auto", "sgl+")):
            await app.action_choose_method(said)
            assert app.options.method == method
        await switched(pilot)
        assert (await answered(pilot, "what?")).options.method == "none"

    played_chat(two_pairs(), act)


def test_a_preset_is_overruled_by_method_and_budget_alone_and_comes_back_with_the_methods():
    """In what is asked, and in what the panel shows of it."""

    async def act(pilot):
        app, asked = pilot.app, []
        for do in (
            lambda: app.action_choose_system("Be brief."),
            lambda: app.action_choose_method("grid"),
            lambda: app.action_choose_method("auto"),
            lambda: app.action_choose_keep("0.5"),
        ):
            await do()
            assert app.query_one(SawPanel)._options == app.options
            asked.append((await answered(pilot, "what?")).options)
        assert [options.preset for options in asked] == ["paper-9", None, "paper-9", None]
        assert asked[-1].system == "Be brief."

    played_chat(chat_app(options=AskOptions(preset="paper-9")), act)


@pytest.mark.parametrize(("changed", "keys"), [("keep", ["right"]), ("method", ["enter", "down", "enter"])])
def test_what_is_chosen_in_the_panel_overrules_a_preset_there_too(changed, keys):
    async def act(pilot):
        app = pilot.app
        before = app.options
        app.query_one("RetentionSlider" if changed == "keep" else "MethodChoice").focus()
        await press(pilot, *keys)
        await until(pilot, lambda: getattr(app.options, changed) != getattr(before, changed))
        assert app.options.preset is None
        assert app.query_one(SawPanel)._options == app.options

    played_chat(chat_app(options=AskOptions(preset="paper-9")), act)


def test_a_pair_that_does_not_fit_is_loaded_where_that_was_agreed_to(monkeypatch):
    """Also anew, where the chat goes private; and the next pair is looked at again."""
    app, opened = two_pairs(), []
    opener = app.conversation._opener

    def looking(name, private, *, anyway=False):
        opened.append((name, private, anyway))
        if name == "other" and not anyway:
            raise NotEnoughMemory("it takes more than there is")
        return opener(name, private)

    app.conversation._opener = looking
    entry = Entry("other", "", {}, {}, (), {}, True)
    huge = Ranked(entry, 40 * 10**9, 38 * 10**9, exact=True)
    monkeypatch.setattr("localvlm.tui.screens.pairs.pairs_of", lambda given: ([huge], 10**9))

    async def act(pilot):
        app = pilot.app
        await app.action_switch_pair("other")
        await until(pilot, lambda: "more than there is" in notes(app))
        assert (await answered(pilot, "what?")).status == "done"
        await pilot.press("f3")
        await until(pilot, lambda: "too large" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("y")
        await until(pilot, lambda: app.query_one(StatusLine).pair == "other")
        await app.action_go_private()
        assert (await answered(pilot, "what?")).status == "done"

    played_chat(app, act)
    assert opened == [
        (None, False, False),
        ("other", False, False),
        (None, False, False),
        ("other", False, True),
        ("other", True, True),
    ]
