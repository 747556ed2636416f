"""The pair switcher: what is here first, whether it fits, and what is asked before it is taken."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from textual.widgets import OptionList

from localvlm.catalog import Entry, entries
from localvlm.errors import UsageError
from localvlm.ranking import Ranked
from localvlm.references import Reference
from localvlm.tui.screens.pairs import PairScreen, pairs_of
from tests.tui.chat_app import pressed_at_once
from tests.tui.chatting import DEADLINE
from tests.tui.stage import Stage, idle, played, press, settled, shown

GB = 10**9
HUB = {"guide": Reference("user/guide"), "model": Reference("user/model")}


def one(name, need, low=None, *, here=True, hub=True, run=True, **about):
    lacking = () if here else ("user/model:Q4_K_M",) if hub else ("/models/gone.gguf",)
    entry = Entry(name, f"what {name} is", {}, HUB if hub else {}, lacking, about, run)
    return Ranked(entry, need, need if low is None else low, exact=here)


ABOUT = {"gb": {"guide": 1.0, "model": 2.5}, "good-at": "charts [red]and photos"}
PAIRS = [
    one(
        "away", 4 * GB, here=False, run=False, gb={"guide": 1.0, "model": 2.5}, **{"good-at": "charts [red]and photos"}
    ),
    one("small", GB),
    one("tight", 12 * GB, 9 * GB),
    one("gone", 2 * GB, here=False, hub=False),
    one("huge", 40 * GB, 38 * GB),
]


def switch(*keys, look=lambda app: None, current=None, size=(80, 30)):
    async def act(pilot):
        await press(pilot, *keys)
        look(pilot.app)

    return played(PairScreen(lambda: (PAIRS, 10 * GB), current), act, size)


def seen(*keys, **given):
    texts = []
    switch(*keys, look=lambda app: texts.append(shown(app)), **given)
    return texts[0]


def test_those_that_are_here_come_first_with_what_they_need():
    text = seen()
    order = [text.index(name) for name in ("On this machine", " small", " tight", " huge", "To pull", " away", " gone")]
    assert order == sorted(order)
    for name, about in {"small": "1.0 GB  fits", "tight": "12.0 GB  fits in turn", "away": "~4.0 GB  fits",
                        "huge": "40.0 GB  too large"}.items():  # fmt: skip
        line = next(line for line in text.split("\n") if f" {name} " in line)
        assert about in line
    assert "10.0 GB of memory are free" in text


def test_of_the_chosen_one_more_is_told():
    text = seen("down", "down", "down")
    assert "what away is; not run by us" in text
    assert "charts [red]and photos" in text
    assert "user/model:Q4_K_M" in text


def test_enter_takes_one_that_fits():
    (choice,) = switch("enter")
    assert (choice.entry.name, choice.pull, choice.low_memory) == ("small", False, False)
    (choice,) = switch("down", "enter")
    assert (choice.entry.name, choice.low_memory) == ("tight", True)
    (choice,) = switch("enter", current="tight")
    assert choice.entry.name == "tight", "the one in use is chosen at first"
    assert switch("escape") == [None]


def test_enter_takes_the_one_that_the_keys_before_it_led_to():
    async def act(pilot):
        pressed_at_once(pilot.app, "down", "enter", "enter")
        await idle(pilot)

    (choice,) = played(PairScreen(lambda: (PAIRS, 10 * GB)), act)
    assert choice.entry.name == "tight"


def test_what_cannot_fit_or_is_not_here_is_asked_about():
    assert "huge needs 40.0 GB of memory, and 10.0 GB are free." in seen("down", "down", "enter")
    assert switch("down", "down", "enter", "n") == []
    (choice,) = switch("down", "down", "enter", "y")
    assert choice.entry.name == "huge"
    assert "away is not here. Pull it, 3.5 GB?" in seen(*["down"] * 3, "enter")
    (choice,) = switch(*["down"] * 3, "enter", "enter")
    assert (choice.entry.name, choice.pull) == ("away", True)
    text = seen("end", "enter")
    assert "it lacks the file '/models/gone.gguf'" in text


def test_it_is_there_before_the_pairs_are_looked_at():
    may, threads = threading.Event(), []

    def look():
        threads.append(threading.current_thread())
        assert may.wait(DEADLINE)
        return PAIRS, 10 * GB

    async def play():
        app = Stage(PairScreen(look))
        async with app.run_test() as pilot:
            await pilot.pause()
            assert "Pairs" in shown(app)
            assert app.screen.query_one(OptionList).loading
            may.set()
            await settled(pilot)
            assert "small" in shown(app)

    asyncio.run(play())
    assert threads[0] is not threading.main_thread()


def test_a_settings_file_that_is_wrong_is_told():
    def look():
        raise UsageError("config file 'c.toml' is not valid TOML", "correct it")

    texts = []

    async def act(pilot):
        texts.append(shown(pilot.app))

    played(PairScreen(look), act)
    assert "config file 'c.toml' is not valid TOML (correct it)" in texts[0]


def test_the_catalogue_and_the_users_pairs_are_all_there(tmp_path):
    own = {"home": {"guide": Path("/models/guide.gguf"), "model": Reference("user/repo", "Q8_0")}}
    found, free = pairs_of(own)
    assert {ranked.entry.name for ranked in found} == {entry.name for entry in entries(own)}
    assert free > 0
    assert next(r for r in found if r.entry.name == "demo").exact
