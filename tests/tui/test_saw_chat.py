"""The panel in the chat: what it previews there is what the next question keeps."""

from __future__ import annotations

from localvlm.answers import AskOptions
from localvlm.engine.fake import Script
from localvlm.tui.widgets.picture_view import PictureView
from localvlm.tui.widgets.retention_slider import RetentionSlider
from localvlm.tui.widgets.stage_bars import StageBars
from tests.tui.chat_app import answered, ask, attach, chat_app, ended, played_chat, until
from tests.tui.chatting import HELD, picture
from tests.tui.stage import press, shown

GUIDE = Script("red")
TILED = Script("dark red", grid=(4, 4), tiles=(2, 3), tile_price=6.0)


def test_the_slider_previews_what_another_chat_would_keep():
    kept: dict[int, tuple[int, ...]] = {}

    async def previewed(pilot) -> None:
        await attach(pilot, picture())
        await answered(pilot, "what?")
        pilot.app.query_one(RetentionSlider).focus()
        for percent in (5, 20, 40):
            await press(pilot, f"+{percent:02}", "tab", "shift+tab")
            [drawing] = pilot.app.query_one(PictureView).drawings
            kept[percent] = tuple(drawing.kept.tolist())

    played_chat(chat_app(GUIDE, TILED, AskOptions(keep=0.6)), previewed)
    for percent in kept:

        async def asked(pilot, percent=percent) -> None:
            await attach(pilot, picture())
            exchange = await answered(pilot, "what?")
            assert exchange.answer.kept_indices == kept[percent]

        played_chat(chat_app(GUIDE, TILED, AskOptions(keep=percent / 100)), asked)


def test_the_bars_stand_still_once_the_answer_is_stopped():
    async def act(pilot) -> None:
        bars = pilot.app.query_one(StageBars)
        exchange = await ask(pilot, "what?")
        await until(pilot, lambda: bars._stage == "decode")
        await pilot.press("escape")
        await ended(pilot, exchange)
        assert bars._stage == ""
        assert bars.ms["decode"] == bars.ms["decode"] > 0

    played_chat(chat_app(model=Script("dark red", token_s=HELD)), act)


def test_a_turn_that_was_taken_back_leaves_the_panel_to_the_one_before():
    async def act(pilot) -> None:
        app = pilot.app
        await attach(pilot, picture())
        for question in ("what?", "and?"):
            await answered(pilot, question)
        assert "of them from before" in shown(app)
        await app.action_undo()
        await until(pilot, lambda: "of them from before" not in shown(app))
        assert "The model answered" in shown(app)
        assert "50 of 144 image tokens" in shown(app)
        await app.action_undo()
        await until(pilot, lambda: "The model answered" not in shown(app))
        assert "image tokens" not in shown(app)
        assert not app.query_one(StageBars).ms

    played_chat(chat_app(), act)


def test_the_picture_of_a_question_that_is_edited_is_there_once_with_what_is_known_of_it():
    async def act(pilot) -> None:
        app = pilot.app
        view = app.query_one(PictureView)
        await attach(pilot, picture())
        await answered(pilot, "what?")
        await pilot.press("up")
        await until(pilot, lambda: app.composer.editing)
        [drawing] = view.drawings
        assert drawing.has_heat
        assert drawing.kept is not None
        await attach(pilot, picture(2))
        await until(pilot, lambda: len(view.drawings) == 2)
        assert [drawing.has_heat for drawing in view.drawings] == [True, False]

    played_chat(chat_app(), act)
