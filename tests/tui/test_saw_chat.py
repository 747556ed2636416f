"""The panel in the chat: what it previews there is what the next question keeps."""

from __future__ import annotations

from localvlm.answers import AskOptions
from localvlm.engine.fake import Script
from localvlm.tui.widgets.picture_view import PictureView
from localvlm.tui.widgets.retention_slider import RetentionSlider
from tests.tui.chat_app import answered, attach, chat_app, played_chat
from tests.tui.chatting import picture
from tests.tui.stage import press

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
