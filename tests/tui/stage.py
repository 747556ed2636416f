"""A stage for one screen: an app without anything else, driven by keys, and what can be read on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from rich.segment import Segment
from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen

from localvlm.tui.themes import DARK, THEMES, role_colours

__all__ = ["SIZES", "Stage", "idle", "patient", "played", "press", "segments", "settled", "shown"]

SIZES = ((40, 12), (80, 24), (300, 80))
"""Columns and rows of terminals that every screen can be used on."""


ROUNDS = 20
NAMED = {" ": "space", "/": "slash", ".": "full_stop", "~": "tilde"}


class Stage(App[None]):
    """Shows ``screen``; ``results`` holds what it was dismissed with."""

    def __init__(self, screen: Screen[Any], theme: str = DARK.name) -> None:
        super().__init__()
        self.first, self.results = screen, []
        for own in THEMES:
            self.register_theme(own)
        self.theme = theme

    results: list[Any]

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return role_colours(self.current_theme)

    def on_mount(self) -> None:
        self.push_screen(self.first, self.results.append)


def played(
    screen: Screen[Any],
    act: Callable[[Pilot[None]], Awaitable[None]],
    size: tuple[int, int] = (80, 24),
    theme: str = DARK.name,
) -> list[Any]:
    """Runs ``act`` with the pilot of a stage on which ``screen`` is; what the screen was dismissed with."""
    app = Stage(screen, theme)

    async def play() -> None:
        async with app.run_test(size=size) as pilot:
            patient(pilot)
            await settled(pilot)
            await act(pilot)
            await settled(pilot)

    asyncio.run(play())
    return app.results


def patient(pilot: Pilot[Any]) -> Pilot[Any]:
    """A pilot that goes on when no message waits any more after a key."""
    press = pilot.press

    async def pressed(*keys: str) -> None:
        await press(*keys)
        await _emptied(pilot)

    pilot.press = pressed  # type: ignore[method-assign]
    return pilot


async def idle(pilot: Pilot[Any]) -> None:
    """Waits until nothing works and no message waits, if that comes to be at all: something may be streamed."""
    await pilot.pause()
    await _emptied(pilot)


async def _emptied(pilot: Pilot[Any]) -> None:
    """A pause alone ends, too, where the process gets no processor."""
    for _ in range(ROUNDS):
        nodes = [pilot.app, *pilot.app.screen.walk_children(with_self=True)]
        if not any(node.message_queue_size for node in nodes):
            return
        await asyncio.sleep(0.01)


async def settled(pilot: Pilot[Any]) -> None:
    """Waits until nothing is being looked up any more, too."""
    await idle(pilot)
    while any(not worker.is_finished for worker in pilot.app.workers):
        await pilot.pause(0.01)
        await idle(pilot)


async def press(pilot: Pilot[Any], *keys: str) -> None:
    """Presses keys, each once the one before has done all it does; "+abc" are the keys of a text, without pauses."""
    for key in keys:
        text = key[1:] if key.startswith("+") and len(key) > 1 else ""
        await pilot.press(*([NAMED.get(c, c) for c in text] or [key]))
        await settled(pilot)


def shown(app: App[Any]) -> str:
    """The text on the screen, line by line."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def segments(app: App[Any]) -> Iterator[Segment]:
    """The text on the screen with its styles."""
    for strip in app.screen._compositor.render_strips():
        yield from strip
