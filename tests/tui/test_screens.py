"""What is so of every screen: its text can be read, its focus seen, all of it reached by keys, and esc closes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from textual.color import Color
from textual.screen import Screen
from textual.widgets import Input, Select

from localvlm.catalog import Entry
from localvlm.ranking import Ranked
from localvlm.references import Reference
from localvlm.tui.commands import COMMANDS
from localvlm.tui.keymap import KEYS
from localvlm.tui.screens.confirm import ConfirmScreen, EditScreen
from localvlm.tui.screens.help import HelpScreen, HelpSection, keyed, typed
from localvlm.tui.screens.history import HistoryScreen
from localvlm.tui.screens.images import ImageBrowser, Place
from localvlm.tui.screens.pairs import PairScreen
from localvlm.tui.screens.settings import ChatSettings, SettingsScreen
from localvlm.tui.themes import DARK, THEMES, contrast
from tests.tui.stage import SIZES, Stage, patient, played, press, segments, settled, shown

GB = 10**9
NOW = 1_790_000_000.0


@dataclass(frozen=True)
class Kept:
    id: int
    title: str
    pair: str | None
    turns: int
    images: int
    updated: float

    @property
    def question(self) -> str:
        return self.title

    @property
    def answer(self) -> str:
        return "The star is **yellow**. [red]It is the only one."


class Shelf:
    """A history that stands in for the real one: what it holds is the same every day."""

    rows = [
        Kept(1, "What colour is the star?", "demo", 3, 1, NOW - 100),
        Kept(2, "Is [red]this[/] \x1b[31mmarkup?\nNo.", "qwen3vl-8b", 1, 2, NOW - 86_400),
        Kept(3, "Compare the two receipts: which one is dearer, and by how much?", None, 12, 2, NOW - 9 * 86_400),
        Kept(4, "Was steht auf dem Schild?", "demo", 1, 0, NOW - 400 * 86_400),
    ]

    def conversations(self, query: str = "", limit: int = 200) -> list[Kept]:
        return [row for row in self.rows if query in row.title][:limit]

    def turns(self, conversation: int) -> list[Kept]:
        return [row for row in self.rows if row.id == conversation]


def _ranked(name: str, need: int | None, here: bool, run: bool = True) -> Ranked:
    about = {"good-at": "documents, charts and photos", "licence": "MIT", "tokens": "256 a tile of 448 x 448 pixels"}
    hub = {"guide": Reference("user/guide"), "model": Reference("user/model")}
    return Ranked(
        Entry(name, f"{name}, a pair", {}, hub, () if here else ("user/model",), about, run), need, need, here
    )


def _pairs() -> tuple[list[Ranked], int]:
    return [
        _ranked("demo", 131_000_000, True), _ranked("qwen3vl-8b", 9 * GB, False, False),
        _ranked("internvl3-14b", None, False, False), _ranked("qwen3vl-32b", 26 * GB, False, False),
    ], 10 * GB  # fmt: skip


def help_screen() -> Screen[Any]:
    return HelpScreen([HelpSection("Keys", keyed(KEYS)), HelpSection("Commands", typed(COMMANDS))])


def settings_screen() -> Screen[Any]:
    names = ("auto", "sgl+", "fastv", "none")
    return SettingsScreen(ChatSettings(exit_at=0.9), names, [t.name for t in THEMES], calibrated=0.977)


def pictures() -> Path:
    folder = Path.home() / "pictures"
    (folder / "holiday").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "my photo.jpg", "bad\x1b[2J\nname.webp", "[red]x.png", "notes.txt"):
        (folder / name).write_bytes(b"x" * 2000)
    return folder


SCREENS: dict[str, Callable[[], Screen[Any]]] = {
    "help": help_screen,
    "history": lambda: HistoryScreen(Shelf(), Path("exports"), lambda: NOW),  # type: ignore[arg-type]
    "pairs": lambda: PairScreen(_pairs, "demo"),
    "images": lambda: ImageBrowser(Place(pictures())),
    "settings": settings_screen,
    "confirm": lambda: ConfirmScreen(
        "Delete \u201cWhat?\u201d, 3 turns? There is no way back.", "Delete", "Keep", danger=True
    ),
    "edit": lambda: EditScreen("Rename", "What colour is the star?"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder that is shown as ~, the same wherever tests run; the same time zone, too."""
    import time

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", SCREENS)
def test_it_has_the_focus_keeps_within_the_terminal_and_esc_closes_it(name, size):
    async def act(pilot):
        screen = pilot.app.screen
        assert screen.focused is not None
        assert screen.region.contains_region(screen.query_one("#dialog").region)
        assert screen.region.contains_region(screen.query_one("KeyHints").region)
        assert "close" in shown(pilot.app), "the way out is always told"
        assert "\x1b" not in shown(pilot.app)
        await press(pilot, "escape")

    assert played(SCREENS[name](), act, size) in ([None], [False])


@pytest.mark.parametrize("no_colour", [False, True], ids=["colour", "NO_COLOR"])
@pytest.mark.parametrize("name", SCREENS)
def test_tab_goes_round_and_the_focus_is_seen_everywhere(name, no_colour, monkeypatch):
    """What is drawn differs wherever the focus is; in shades of grey, too."""
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")

    async def act(pilot):
        drawn, first = {}, pilot.app.focused
        for _ in range(40):
            focused = pilot.app.focused
            drawn[focused] = [(s.text, s.style) for s in segments(pilot.app)]
            await press(pilot, "tab")
            if pilot.app.focused is first:
                break
        focusable = [w for w in pilot.app.screen.query("*") if w.focusable and not isinstance(w.parent, Select)]
        assert set(drawn) == set(focusable)
        assert len({str(one) for one in drawn.values()}) == len(drawn)

    played(SCREENS[name](), act, (80, 30))


@pytest.mark.parametrize("theme", [theme.name for theme in THEMES])
@pytest.mark.parametrize("name", SCREENS)
def test_all_text_on_it_can_be_read(name, theme):
    """WCAG 2's 4.5 for text, of what is really drawn; frames and bars are no text."""

    async def act(pilot):
        low = {}
        for segment in segments(pilot.app):
            style = segment.style
            if not re.search(r"\w", segment.text) or style is None or style.color is None or style.bgcolor is None:
                continue
            inks = [Color.from_rich_color(c) for c in (style.color, style.bgcolor)]
            if (ratio := contrast(*inks)) < 4.5:
                low[segment.text.strip()] = (round(ratio, 2), *(ink.hex for ink in inks))
        assert not low

    async def both(pilot):
        await act(pilot)
        await press(pilot, "down")
        await act(pilot)

    played(SCREENS[name](), both, (80, 30), theme)


async def still(pilot):
    """Cursors blink no more."""
    for field in pilot.app.screen.query(Input):
        field.cursor_blink = False
    await pilot.pause()


SHOTS = {
    "help": ("80x24", "40x12", "80x24:+copy"),
    "history": ("80x24", "40x12", "80x24:down", "80x24:down d", "80x24:+nowhere"),
    "pairs": ("80x24", "40x12", "80x24:down enter"),
    "images": ("80x24", "40x12", "80x24:down space space"),
    "settings": ("80x24", "40x12", "80x24:tab +9", "80x24:enter"),
    "confirm": ("80x24", "40x12"),
    "edit": ("80x24",),
}
"""Sizes, and the keys that are pressed before the picture is taken."""


@pytest.mark.parametrize(
    ("name", "shot"),
    [(name, shot) for name, shots in SHOTS.items() for shot in shots],
    ids=lambda part: re.sub("[: ]", "-", part),
)
def test_it_looks_as_it_did(name, shot, snap_compare):
    size, _, keys = shot.partition(":")

    async def before(pilot):
        await settled(patient(pilot))  # what is listed, before keys choose of it
        await press(pilot, *keys.split())
        await still(pilot)

    columns, rows = map(int, size.split("x"))
    assert snap_compare(Stage(SCREENS[name](), DARK.name), run_before=before, terminal_size=(columns, rows))


@pytest.mark.parametrize("name", ["history", "settings", "pairs"])
def test_it_looks_as_it_did_in_the_light_theme(name, snap_compare):
    async def before(pilot):
        await settled(patient(pilot))
        await press(pilot, "down")
        await still(pilot)

    assert snap_compare(Stage(SCREENS[name](), THEMES[1].name), run_before=before)
