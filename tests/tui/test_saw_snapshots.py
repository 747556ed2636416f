"""The panel's screens as pictures, state by state, in both themes and in several widths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from localvlm.answers import AskOptions
from localvlm.tui.picture import View
from localvlm.tui.themes import DARK, LIGHT
from localvlm.tui.widgets.method_choice import MethodChoice
from localvlm.tui.widgets.picture_view import PictureView
from localvlm.tui.widgets.retention_slider import RetentionSlider
from localvlm.tui.widgets.stage_bars import StageBars
from tests.tui.saw import QUESTION, PanelApp, asked, picture, plain
from tests.tui.stage import press, settled

Before = Callable[[Pilot[Any]], Awaitable[None]]


def scene(n_pictures: int = 1, *, until: str = "answer", view: View = View.HEAT, focus: type | None = None,
          keys: tuple[str, ...] = (), **options: Any) -> Before:  # fmt: skip
    """A question up to a place."""

    async def before(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, PanelApp)
        panel, pictures = app.panel, [picture(), plain(), plain(30, 60, "tall.png")][:n_pictures]
        panel.set_options(AskOptions(**options))
        panel.show_images(pictures)
        if until != "pictures":
            look, answer = asked(pictures, **options)
            bars, now = panel.query_one(StageBars), [0.0]
            bars._clock = lambda: now[0]
            panel.begin(QUESTION)
            for stage, seconds in (
                ("guide_encode", 0.9),
                ("guide_prefill", 0.3),
                ("guide_decode", 0.1),
                ("encode", 1.7),
            ):
                panel.stage(stage)
                now[0] += seconds
            if look is not None:
                panel.looked(look)
            if until == "answer":
                panel.answered(answer)
            if until == "failure":
                panel.failed("The engine was ended by SIGKILL; ask again.")
        panel.query_one(PictureView).view = view
        if focus is not None:
            panel.query_one(focus).focus()
        await settled(pilot)
        await press(pilot, *keys)

    return before


STATES = {
    "empty": (scene(0, until="pictures"), DARK.name, (40, 30)),
    "picture": (scene(until="pictures"), LIGHT.name, (40, 30)),
    "working": (scene(until="look"), DARK.name, (40, 36)),
    "model": (scene(keep=0.35, exit_at=0.96), DARK.name, (44, 40)),
    "model-light": (scene(keep=0.35, exit_at=0.96), LIGHT.name, (44, 40)),
    "guide": (scene(exit_at=0.9), DARK.name, (44, 40)),
    "kept": (scene(keep=0.2, view=View.KEPT, focus=PictureView), LIGHT.name, (44, 40)),
    "narrow": (scene(keep=0.35, exit_at=0.96, focus=PictureView), DARK.name, (28, 40)),
    "wide": (scene(keep=0.35, exit_at=0.96), LIGHT.name, (80, 60)),
    "several": (scene(3, keep=0.3, focus=PictureView, keys=("left", "left")), DARK.name, (44, 40)),
    "moved": (scene(keep=0.35, focus=RetentionSlider, keys=("+12",)), DARK.name, (44, 40)),
    "methods": (scene(keep=0.35, focus=MethodChoice, keys=("enter",)), DARK.name, (44, 40)),
    "no-preview": (scene(keep=0.35, focus=MethodChoice, keys=("enter", "+div", "enter")), LIGHT.name, (44, 40)),
    "failure": (scene(until="failure"), DARK.name, (44, 40)),
}


@pytest.mark.parametrize("state", STATES)
def test_states(state: str, snap_compare) -> None:
    before, theme, size = STATES[state]
    assert snap_compare(PanelApp(theme), run_before=before, terminal_size=size)


@pytest.mark.parametrize("view", list(View))
def test_without_colours(view: View, snap_compare, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert snap_compare(PanelApp(), run_before=scene(keep=0.35, view=view), terminal_size=(44, 40))
