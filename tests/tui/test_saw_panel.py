"""The panel, driven as the app and as people drive it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.color import ColorSystem
from textual.pilot import Pilot
from textual.widgets import Select

from localvlm.answers import AskOptions
from localvlm.engine.api import ImageLayout
from localvlm.engine.fake import Script
from localvlm.images import Image
from localvlm.tui.picture import Protocol, View
from localvlm.tui.themes import DARK, LIGHT
from localvlm.tui.widgets.method_choice import MethodChoice
from localvlm.tui.widgets.picture_caption import PictureCaption
from localvlm.tui.widgets.picture_view import PictureView
from localvlm.tui.widgets.retention_slider import RetentionSlider
from localvlm.tui.widgets.saw_panel import AT_ONCE, SawPanel
from localvlm.tui.widgets.stage_bars import StageBars, duration
from tests.tui.saw import MODEL, QUESTION, PanelApp, asked, picture, plain
from tests.tui.stage import press, settled, shown

Act = Callable[[Pilot[Any], PanelApp], Awaitable[None]]


def played(act: Act, size: tuple[int, int] = (44, 44), app: PanelApp | None = None) -> PanelApp:
    app = app or PanelApp()

    async def play() -> None:
        async with app.run_test(size=size) as pilot:
            await settled(pilot)
            await act(pilot, app)
            await settled(pilot)

    asyncio.run(play())
    return app


async def tell(app: PanelApp, pictures: list[Image], **options: Any) -> None:
    """A whole question."""
    panel = app.panel
    panel.set_options(AskOptions(**options))
    panel.show_images(pictures)
    panel.begin(QUESTION)
    look, answer = asked(pictures, **options)
    if look is not None:
        panel.looked(look)
    panel.answered(answer)


def words(app: PanelApp) -> str:
    """What can be read, however its lines are broken."""
    return " ".join(shown(app).split())


def kept_of(app: PanelApp) -> list[list[int] | None]:
    drawings = app.query_one(PictureView).drawings
    return [None if d.kept is None else d.kept.tolist() for d in drawings]


# ---- what the app tells


def test_an_answer_by_the_model() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()], keep=0.35, exit_at=0.95)
        await settled(pilot)
        text = words(app)
        assert "The model answered from 50 of 144" in text
        assert "not sure enough: 0.947 < 0.95" in text
        assert "confidence 0.90" in text
        assert "consistency 0.99" in text
        assert "2.6 s" in text
        assert "scene.png" in text
        _, answer = asked([picture()], keep=0.35, exit_at=0.95)
        assert kept_of(app) == [list(answer.kept_indices)]

    played(act)


def test_an_answer_by_the_guide_says_what_was_saved() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()], exit_at=0.5)
        await settled(pilot)
        text = words(app)
        assert "The guide answered; the model did not run." in text
        assert "The guide was sure: 0.95 ≥ 0.5" in text
        assert text.count("not needed") == 3
        assert "would keep 28 of 81" in text, "on the guide's own grid"

    played(act)


def test_the_guides_attention_is_there_before_the_answer() -> None:
    async def act(pilot, app) -> None:
        app.panel.show_images([picture()])
        app.panel.begin(QUESTION)
        await settled(pilot)
        before = shown(app)
        assert not app.query_one(PictureView).drawings[0].has_heat
        look, answer = asked([picture()])
        app.panel.looked(look)
        await settled(pilot)
        assert app.query_one(PictureView).drawings[0].has_heat
        assert "The guide has looked." in shown(app)
        assert "would keep 28 of 81" in shown(app)
        assert before != shown(app)
        app.panel.answered(answer)
        await settled(pilot)
        assert "50 of 144 image tokens" in shown(app)
        assert "would" not in shown(app)

    played(act)


def test_once_the_models_grid_is_known_looks_are_previewed_on_it() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()], keep=0.35)
        app.panel.begin("Another question?")
        await settled(pilot)
        assert kept_of(app) == [None]
        look, answer = asked([picture()], keep=0.35)
        app.panel.looked(look)
        assert kept_of(app) == [list(answer.kept_indices)]
        await settled(pilot)
        assert "would keep 50 of 144" in shown(app)

    played(act)


def test_a_failure_stops_the_clock_and_says_why() -> None:
    async def act(pilot, app) -> None:
        app.panel.show_images([picture()])
        app.panel.begin(QUESTION)
        app.panel.stage("guide_encode")
        app.panel.failed("The engine was ended by SIGKILL.")
        bars = app.query_one(StageBars)
        assert bars.ms == bars.ms
        await settled(pilot)
        assert "SIGKILL" in shown(app)

    played(act)


def test_clear_forgets_the_question() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()])
        app.panel.clear()
        await settled(pilot)
        text = shown(app)
        assert "answered" not in text
        assert "tokens" not in text
        assert kept_of(app) == [None]
        app.panel.show_images([])
        await settled(pilot)
        assert "no picture yet" in shown(app)

    played(act)


def test_pictures_that_wait_keep_what_is_known_of_the_others() -> None:
    first, second = picture(), plain(name="later.png")

    async def act(pilot, app) -> None:
        await tell(app, [first])
        known = kept_of(app)
        app.panel.show_images([first, second])
        await settled(pilot)
        assert kept_of(app) == [*known, None]
        assert "later.png" in shown(app), "the one that was added"
        assert "2 of 2" in shown(app)
        app.panel.show_images([first])
        assert kept_of(app) == known
        app.panel.show_images([second])
        assert kept_of(app) == [None]

    played(act)


def test_large_pictures_are_scaled_beside_the_app() -> None:
    large = plain(2 * AT_ONCE // 1000, 1000)

    async def act(pilot, app) -> None:
        app.panel.show_images([large])
        assert not app.query_one(PictureView).drawings
        app.panel.begin(QUESTION)
        look, answer = asked([large], keep=0.2)
        app.panel.looked(look)
        await settled(pilot)
        [drawing] = app.query_one(PictureView).drawings
        assert max(drawing.pixels.shape) == 640
        assert drawing.has_heat, "what was told meanwhile"
        app.panel.show_images([large, plain()])
        app.panel.show_images([])
        await settled(pilot)
        assert not app.query_one(PictureView).drawings
        del answer

    played(act)


def test_stages_come_in_any_order_and_add_up() -> None:
    now = [0.0]
    bars = StageBars(clock=lambda: now[0])
    for stage, seconds in (("load", 0.01), ("guide_prefill", 1), ("guide_decode", 2), ("guide_prefill", 3)):
        bars.stage(stage)
        now[0] += seconds
    assert bars.ms == pytest.approx({"load": 10, "guide_prefill": 4000, "guide_decode": 2000})
    bars.stop()
    now[0] += 5
    assert bars.ms["guide_prefill"] == pytest.approx(4000)
    bars.clear()
    assert bars.ms == {}


def test_the_bar_of_the_running_stage_grows() -> None:
    async def act(pilot, app) -> None:
        bars, now = app.query_one(StageBars), [0.0]
        bars._clock = lambda: now[0]
        app.panel.stage("guide_encode")
        now[0] = 4.0
        app.panel.stage("prefill")
        lengths = []
        for now[0] in (4.5, 6.0, 8.0, 12.0):
            bars._redraw()
            await settled(pilot)
            lines = {line[1:15].strip(): line for line in shown(app).splitlines()}
            lengths.append(tuple(sum(c in "█▏▎▍▌▋▊▉" for c in lines[s]) for s in ("guide looks", "model reads")))
        guide, model = zip(*lengths, strict=True)
        assert model[0] < model[1] < model[2] == guide[2] == guide[0]
        assert guide[3] == pytest.approx(guide[0] / 2, abs=1)
        assert "8.0 s" in lines["model reads"]

    played(act)


@pytest.mark.parametrize(
    ("ms", "told"),
    [
        (0, "0 ms"),
        (0.6, "1 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (59_940, "59.9 s"),
        (1e6, "17 min"),
        (5e7, "833 min"),
    ],
)
def test_durations(ms: float, told: str) -> None:
    assert duration(ms) == told
    assert len(duration(ms)) <= 7


# ---- what people do


def test_the_slider_shows_what_another_question_would_keep() -> None:
    """Each step is what a real question with that share keeps."""

    async def act(pilot, app) -> None:
        pictures = [picture(), plain()]
        await tell(app, pictures, keep=0.35)
        app.query_one(RetentionSlider).focus()
        for keys, keep in ((["left"], 0.34), (["home"], 0.01), (["end"], 1.0), (["+20"], 0.2), (["shift+right"], 0.3)):
            await press(pilot, *keys)
            _, answer = asked(pictures, keep=keep)
            shares = kept_of(app)
            assert [*shares[0], *(144 + i for i in shares[1])] == list(answer.kept_indices)
            total = f"would keep {len(answer.kept_indices)} of 288" if keep < 1 else "would keep all 288"
            assert total in shown(app)
        await press(pilot, "+35")
        assert "\n 101 of 288 image tokens" in shown(app), "that of the answer itself"

    app = played(act)
    assert app.told == [0.34, 0.01, 1.0, 0.02, 0.2, 0.3, 0.03, 0.35]


def test_digits_say_the_percent() -> None:
    async def act(pilot, app) -> None:
        slider = app.query_one(RetentionSlider)
        slider.focus()
        for keys, percent in (
            ("+7", 7),
            ("+5", 75),
            ("+5", 5),
            ("+0", 50),
            ("left", 49),
            ("+100", 100),
            ("home", 1),
            ("+0", 1),
        ):
            await press(pilot, keys)
            assert slider.percent == percent, keys

    played(act)


def test_the_mouse_moves_the_slider() -> None:
    async def act(pilot, app) -> None:
        slider = app.query_one(RetentionSlider)
        left, width = slider.content_region.x, slider.content_region.width
        y = slider.content_region.y
        await pilot.mouse_down(offset=(left + width - 1, y))
        assert slider.percent == 100
        await pilot.hover(offset=(left + width // 2 + 6, y))
        assert 40 < slider.percent < 60
        await pilot.mouse_up(offset=(left, y))
        before = slider.percent
        await pilot.hover(offset=(left + 20, y))
        assert slider.percent == before, "the button is up"
        await pilot.mouse_down(offset=(left, y))
        assert slider.percent == 1
        await pilot.mouse_up(offset=(left, y))

    app = played(act)
    assert app.told[0] == 1.0
    assert app.told[-1] == 0.01


def test_methods_change_the_map_or_say_why_not() -> None:
    async def act(pilot, app) -> None:
        pictures = [picture()]
        await tell(app, pictures, keep=0.2)
        choice = app.query_one(MethodChoice)
        for name in ("sgl", "grid", "random"):
            choice.value = name
            await settled(pilot)
            assert kept_of(app) == [list(asked(pictures, method=name, keep=0.2)[1].kept_indices)]
        for name, words in (("divprune", "features"), ("fastv", "layers")):
            choice.value = name
            await settled(pilot)
            assert words in " ".join(shown(app).split())
            assert kept_of(app) == [None]
        choice.focus()
        await press(pilot, "enter", "home", "enter")
        assert kept_of(app) == [list(asked(pictures, keep=0.2)[1].kept_indices)]

    app = played(act)
    assert app.told == ["sgl", "grid", "random", "divprune", "fastv", "sgl+"]


def test_what_the_app_sets_is_not_told_back() -> None:
    async def act(pilot, app) -> None:
        for options in (AskOptions("sgl", keep=0.9), AskOptions(keep="auto"), AskOptions("grid", keep=None)):
            app.panel.set_options(options)
            await settled(pilot)
        assert app.query_one(RetentionSlider).percent == 100
        assert app.query_one(Select).value == "grid"

    assert played(act).told == []


def test_h_goes_through_the_views_and_a_click_chooses_one() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()])
        view = app.query_one(PictureView)
        view.focus()
        seen = [view.view]
        for _ in range(3):
            await press(pilot, "h")
            seen.append(view.view)
        assert seen == [View.HEAT, View.KEPT, View.PICTURE, View.HEAT]
        caption = app.query_one(PictureCaption).content_region
        for x, chosen in ((2, View.PICTURE), (18, View.KEPT), (10, View.HEAT), (40, View.HEAT)):
            await pilot.click(offset=(caption.x + x, caption.y + 1))
            await settled(pilot)
            assert view.view is chosen

    played(act)


def test_arrows_go_from_picture_to_picture() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture("one.png"), plain(name="two.png"), plain(30, 90, "three.png")], keep=0.2)
        view = app.query_one(PictureView)
        view.focus()
        for key, name in (("left", "two.png"), ("left", "one.png"), ("left", "three.png"), ("right", "one.png")):
            await press(pilot, key)
            assert name in shown(app)

    played(act)


def test_everything_is_reached_by_tab_and_shows_it() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()])
        await settled(pilot)
        reached, plain_screen = [], app.export_screenshot()
        for _ in range(3):
            await press(pilot, "tab")
            reached.append(type(app.focused).__name__)
            assert app.focused.region.x == 0
            edge = list(app.screen._compositor.render_strips())[app.focused.region.y]
            assert edge.text[0] != " ", "a bar beside what has the focus"
        assert sorted(reached) == ["MethodChoice", "PictureView", "RetentionSlider"]
        assert plain_screen

    played(act)


# ---- whatever comes


@pytest.mark.parametrize(
    "name", ["[red]x[/]", "[/]", "[@click=app.quit]go[/]", "a\x1b]0;evil\x07b", "\u202egnp", "x" * 9000, ""]
)
def test_names_and_texts_are_shown_as_they_are(name: str) -> None:
    async def act(pilot, app) -> None:
        app.panel.show_images([replace(picture(), name=name)])
        app.panel.failed(name or "no reason")
        await settled(pilot)
        text = shown(app)
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
        if name.startswith("["):
            assert text.count(name) == 2

    played(act, size=(80, 40))


@pytest.mark.parametrize("width", [28, 36, 80])
@pytest.mark.parametrize("theme", [DARK.name, LIGHT.name])
@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (64, 48)])
def test_any_picture_in_any_width(width: int, theme: str, size: tuple[int, int]) -> None:
    async def act(pilot, app) -> None:
        await tell(app, [plain(*size)], keep=0.2, exit_at=0.99)
        await settled(pilot)
        lines = shown(app).splitlines()
        assert len(lines) == 30
        assert "keep" in shown(app)
        view = app.query_one(PictureView)
        assert 1 <= view.size.height <= 15
        await press(pilot, "tab", "h", "h", "h")

    played(act, size=(width, 30), app=PanelApp(theme))


def test_a_terminal_of_few_rows_scrolls_by_keys() -> None:
    async def act(pilot, app) -> None:
        await tell(app, [picture()])
        app.query_one(PictureView).focus()
        await settled(pilot)
        assert "model answers" not in shown(app)
        await press(pilot, "pagedown", "pagedown", "pagedown")
        assert "model answers" in shown(app)

    played(act, size=(30, 12))


def test_unknown_places_and_counts_that_differ_are_no_error() -> None:
    async def act(pilot, app) -> None:
        _, answer = asked([picture()], method="none")
        app.panel.set_options(AskOptions("none"))
        app.panel.show_images([picture()])
        app.panel.begin(QUESTION)
        app.panel.answered(replace(answer, layouts=(ImageLayout(144, None, None, 144),)))
        await settled(pilot)
        assert "all 144 image tokens" in shown(app)
        app.panel.answered(replace(answer, layouts=answer.layouts * 2))
        app.panel.show_images([])
        app.panel.answered(replace(answer, layouts=()))

    played(act)


def test_tiles_are_told() -> None:
    async def act(pilot, app) -> None:
        scripts = {"guide": Script(), "model": replace(MODEL, grid=(4, 4), tiles=(2, 2), tile_price=4.0)}
        look, answer = asked([picture()], scripts, keep=0.2)
        app.panel.set_options(AskOptions(keep=0.2))
        app.panel.show_images([picture()])
        app.panel.begin(QUESTION)
        app.panel.looked(look)
        app.panel.answered(answer)
        await settled(pilot)
        assert f"Encoded {answer.tiles.encoded} of 5 tiles" in shown(app)
        assert kept_of(app) == [list(answer.kept_indices)]

    played(act)


def test_without_colours_there_are_dots_and_shades(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def act(pilot, app) -> None:
        await tell(app, [picture()])
        await settled(pilot)
        assert set("░▒▓█") & set(shown(app))
        app.query_one(PictureView).focus()
        await press(pilot, "h")
        assert any(0x2800 < ord(c) < 0x2900 for c in shown(app))
        assert "▀" not in shown(app)

    played(act)


def test_256_colours_are_used_where_there_are_no_more(monkeypatch) -> None:
    monkeypatch.delenv("COLORTERM")
    monkeypatch.setenv("TERM", "xterm-256color")
    found = {}

    async def act(pilot, app) -> None:
        ramp = np.linspace(0, 255, 120).astype(np.uint8)[None, :, None].repeat(90, axis=0).repeat(3, axis=2)
        app.panel.show_images([Image(ramp, "ramp.png")])
        await settled(pilot)
        found["colours"] = {
            tuple(s.style.color.get_truecolor())
            for strip in app.query_one(PictureView)._strips
            for s in strip
            if s.style
        }

    played(act)
    assert 4 <= len(found["colours"]) <= 40


@pytest.mark.parametrize("pictures", [Protocol.KITTY, Protocol.SIXEL, Protocol.NONE])
def test_graphics_are_written_between_those_of_the_app(pictures: Protocol, monkeypatch) -> None:
    monkeypatch.setattr("localvlm.tui.widgets.graphics.cell_pixels", lambda: (8, 15))
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "TMUX"})
    written: list[str] = []

    async def act(pilot, app) -> None:
        app._driver.write = written.append
        await tell(app, [picture()])
        await settled(pilot)
        graphics = [w for w in written if w.startswith(("\x1b_G", "\x1b7"))]
        text = shown(app)
        if pictures is Protocol.NONE:
            assert not graphics
            assert "▀" not in text
        elif pictures is Protocol.KITTY:
            assert graphics[-1].startswith("\x1b_Ga=T,U=1,q=2,f=24")
            assert "\U0010eeee" in text
            view = app.query_one(PictureView)
            behind = {segment.style.bgcolor for strip in view._strips for segment in strip}
            assert behind == {view.rich_style.bgcolor}, "no bars where cells are not twice as high as wide"
            app.query_one(PictureView).focus()
            await press(pilot, "h")
            again = [w for w in written if w.startswith("\x1b_Ga=T")]
            assert len(again) > 1, "another view has other pixels"
            assert "\U0010eeee" in shown(app)
        else:
            column = app.query_one(PictureView).content_region.x + 1
            assert graphics[-1].startswith(f"\x1b7\x1b[1;{column}H\x1bP")
            assert graphics[-1].endswith("\x1b\\\x1b8")
            strips = app.query_one(PictureView)._strips
            size = f'"1;1;{8 * strips[0].cell_length};{15 * len(strips)}#'
            assert size in graphics[-1], "no cell is left to half blocks"
            before = len(graphics)
            app.query_one(MethodChoice).focus()
            await press(pilot, "enter")
            del written[:]
            app.query_one(PictureView).redraw()
            await settled(pilot)
            assert not [w for w in written if w.startswith("\x1b7")], "nothing is drawn over a list that is open"
            assert before

    played(act, app=PanelApp(pictures=pictures))
    if pictures is Protocol.KITTY:
        assert written[-1].startswith("\x1b_Ga=d"), "it is forgotten at the end"


def test_sixels_bring_their_own_colours(monkeypatch) -> None:
    monkeypatch.setattr("localvlm.tui.widgets.graphics.cell_pixels", lambda: (8, 15))
    written: list[str] = []

    async def act(pilot, app) -> None:
        app.console._color_system = ColorSystem.STANDARD
        app._driver.write = written.append
        await tell(app, [picture()])
        await settled(pilot)
        assert any(w.startswith("\x1b7") for w in written) != app.no_color

    played(act, app=PanelApp(pictures=Protocol.SIXEL))
    monkeypatch.setenv("NO_COLOR", "1")
    del written[:]
    played(act, app=PanelApp(pictures=Protocol.SIXEL))


def test_the_panel_tells_its_price_of_tiles() -> None:
    """With what is loaded known, a preview leaves out the tiles that a question leaves out."""

    async def act(pilot, app) -> None:
        from pathlib import Path

        from localvlm.engine.fake import FakeEngine

        scripts = {"guide": Script(), "model": Script(grid=(4, 4), tiles=(2, 3), tile_price=6.0)}
        infos = {role: FakeEngine(scripts).load(Path(role), Path("p")).info for role in scripts}
        app.panel.loaded(infos["guide"], infos["model"])
        app.panel.show_images([picture()])
        app.panel.begin(QUESTION)
        look, answer = asked([picture()], scripts, keep=0.5)
        app.panel.looked(look)
        app.panel.answered(answer)
        for percent in (5, 20, 40):
            app.query_one(RetentionSlider).choose(percent)
            await settled(pilot)
            assert kept_of(app) == [list(asked([picture()], scripts, keep=percent / 100)[1].kept_indices)]

    played(act)


def test_messages_are_those_of_the_panel() -> None:
    assert SawPanel.RetentionChanged(0.5).keep == 0.5
    assert SawPanel.MethodChanged("sgl").name == "sgl"
