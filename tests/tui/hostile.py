"""A chat in which every text is hostile, played on a terminal of its own: ``python -m tests.tui.hostile FOLDER``.

The engine, the picture's name, the question, errors and the history all hold the same attacks. What the app writes to
the terminal is looked at by tests.tui.test_hostile.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from localvlm.answers import AskOptions
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import ModelError
from localvlm.history import History
from localvlm.tui.app import ChatApp
from localvlm.tui.attachments import Attached
from localvlm.tui.setup import ChatSetup
from localvlm.tui.widgets.chips import Chips
from localvlm.tui.widgets.message import AnswerMessage
from localvlm.tui.widgets.saw_panel import SawPanel
from tests.tui.chatting import fake_opener, picture

__all__ = ["ATTACKS", "MARK"]

MARK = "7741"
"""In each attack's parameters, so that none is a sequence that the app writes itself."""
ATTACKS = {
    "title": f"\x1b]0;owned{MARK}\x07",
    "link": f"\x1b]8;;https://example.org/{MARK}\x1b\\",
    "clipboard": f"\x1b]52;c;ZXZpb{MARK}==\x07",
    "clear": f"\x1b[2;{MARK}J",
    "alternate screen": f"\x1b[?1049;{MARK}l",
    "colour": f"\x1b[38;2;1;2;{MARK}m",
    "dcs": f"\x1bP+q544e{MARK}\x1b\\",
    "apc": f"\x1b_Gf=100;AAAA{MARK}\x1b\\",
    "pm": f"\x1b^secret{MARK}\x1b\\",
    "c1 csi": f"\x9b31;{MARK}m",
    "c1 osc": f"\x9d0;owned{MARK}\x9c",
    "c1 dcs": f"\x90q{MARK}\x9c",
    "bell": "\x07",
    "override": "\u202e",
    "isolate": "\u2066\u2069",
    "tag": "\U000e0041\U000e007f",
    "split": f"\x1b]0;a\x1b]52;c;{MARK}x\x07",
}
ALL = (
    "&#27;]0;owned&#7; &#x202e; ok ".join(ATTACKS.values())
    + "[red]red[/] [@click=app.quit]quit[/] [link](https://example.org) <https://example.org> end"
)


class Hostile(ChatApp):
    """Plays its scene when all is there, and leaves."""

    async def _begin(self) -> None:
        await super()._begin()
        try:
            async with asyncio.timeout(110):
                await self._scene()
            self.exit(0)
        except TimeoutError:
            self.exit(9, return_code=9)

    async def _scene(self) -> None:
        await self._until(lambda: bool(self.query(SawPanel)) and self.options is not None)
        await self.query_one(Chips).add(
            [Attached(picture(1, ALL).image, Path("/no/such") / ALL.replace("/", "_").replace("\0", "")[:99])]
        )
        self.composer.write(ALL)
        await self._drawn()
        await self.send(ALL)
        await self._until(
            lambda: bool(self.query(AnswerMessage)) and self.query(AnswerMessage).last().has_class("-model")
        )
        await self._drawn()
        self.warn(ModelError(ALL, ALL), "error")
        self.action_stats()
        await self._drawn()
        self.action_resume()
        await self._until(lambda: len(self.screen_stack) > 1)
        await self._drawn()
        self.screen.dismiss(None)
        self.conversation.set(method=ALL)
        await self.send("and?")
        await self._until(lambda: self.query(AnswerMessage).last().has_class("-failed"))
        self.set_options(method="sgl", exit_at=0.0)
        self.conversation.switch(ALL)
        await self._drawn()
        await self.send("the guide?")
        await self._until(lambda: self.query(AnswerMessage).last().has_class("-guide"))
        await self._drawn()

    async def _until(self, true) -> None:
        while not true():
            await asyncio.sleep(0.02)

    async def _drawn(self) -> None:
        await asyncio.sleep(0.3)


def main() -> int:
    folder = Path(sys.argv[1])
    script = Script(ALL, n_ctx=100_000)
    engine = FakeEngine({"guide": script, "model": replace(script)})
    app = Hostile(
        ChatSetup(
            fake_opener(engine, AskOptions(max_tokens=4000, guide_max_tokens=4000)),
            ALL,
            history=lambda: History.open(folder / "history.db"),
            note=ALL,
        )
    )
    app.run()
    app.close()
    return app.return_code or 0


if __name__ == "__main__":
    sys.exit(main())
