"""The history: resumed, and written as Markdown."""

from __future__ import annotations

import math
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on

from localvlm.errors import ImageError, LocalvlmError, StorageError, UsageError

from .attachments import Attached, from_stored
from .background import in_thread
from .exchange import Exchange
from .parts import ChatParts
from .recorder import HistoryRecorder, exchange_of
from .text import shown_path
from .widgets.chat_log import STEP, Earlier
from .widgets.chips import Chips

if TYPE_CHECKING:
    from localvlm.history import StoredTurn

__all__ = ["HistoryActions"]


class HistoryActions(ChatParts):
    """All that touches the disk does so in a thread."""

    def action_resume(self) -> None:
        """Shows the history, to go on with a conversation of it."""
        if self.recorder is None:
            self.warn(UsageError("there is no history: this chat is private"))
            return
        self.run_worker(self._history(self.recorder), group="history", exclusive=True)

    async def _history(self, recorder: HistoryRecorder) -> None:
        from .screens.history import HistoryScreen

        try:
            history = await in_thread(recorder.history)
        except LocalvlmError as error:
            self.warn(error, "error")
            return
        screen: HistoryScreen = HistoryScreen(history, Path.cwd())
        self.push_screen(screen, self._resume)

    async def _resume(self, number: int | None) -> None:
        if number is not None and self.recorder is not None:
            self.run_worker(self._resuming(number, self.recorder), group="resume", exclusive=True)

    async def _resuming(self, number: int, recorder: HistoryRecorder) -> None:
        self.status("reading the conversation\u2026")
        chips, composer = self.query_one(Chips), self.composer
        before = composer.text, composer.editing, chips.attached
        await chips.clear()
        composer.clear()
        self.resuming = True  # what is written from here on stays, and is asked in what was resumed
        try:
            turns = await in_thread(lambda: recorder.history().turns(number))
            exchanges, lost = await in_thread(partial(_restored, turns))
        except LocalvlmError as error:
            self.warn(error, "error")
            self.status("not resumed")
            await self._given_back(*before)
            return
        finally:
            self.resuming = False
        self.conversation.restore(exchanges, number)
        self.turn_told = exchanges[-1].turn if exchanges else 0
        await self.log_view.clear()
        await self.show_earlier()
        self.log_view.anchor()
        await chips.add(_unanswered(exchanges))
        self.show_pictures()
        for each in lost:
            self.warn(each)
        without = f", without {len(lost)} of its pictures" if lost else ""
        self.status(f"the conversation goes on{without}")
        composer.prompt.focus()

    async def _given_back(self, text: str, editing: bool, attached: list[Attached]) -> None:
        """What was written, and its pictures, before what was written meanwhile."""
        await self.query_one(Chips).add(attached)
        if editing:
            self.composer.edit(text + self.composer.text)
        else:
            self.composer.give_back(text)

    @on(Earlier.Wanted)
    async def _earlier_wanted(self) -> None:
        folded = self._folded(math.inf)
        await self.show_earlier()
        if folded and (newest := self.log_view.answer(folded[-1].turn)) is not None:
            newest.focus()

    async def show_earlier(self, before: float = math.inf) -> None:
        """Shows more of the turns that are folded; of those older than ``before`` if none is shown."""
        for exchange in reversed(self._folded(before)[-STEP:]):
            message = await self.log_view.add_earlier(exchange.turn, exchange.question, exchange.images)
            await message.restored(exchange)
        self.count_folded(before)

    def count_folded(self, before: float = math.inf) -> None:
        """Tells how many turns are not shown."""
        self.log_view.fold(len(self._folded(before)))

    def _folded(self, before: float) -> list[Exchange]:
        """Turns that are older than those that are shown, or than one if none is."""
        oldest = min(self.log_view.turns, default=before)
        return [exchange for exchange in self.conversation.exchanges if exchange.turn < oldest]

    async def taken_back(self, turn: int) -> None:
        """A turn's messages go; where no other is left, those before it come."""
        await self.log_view.remove_turn(turn)
        if self.log_view.turns:
            self.count_folded()
        else:
            await self.show_earlier(turn)

    def action_save(self, folder: str = "") -> None:
        """Writes the conversation as Markdown, with its pictures."""
        recorder = self.recorder
        if recorder is None or recorder.conversation is None:
            self.warn(UsageError("there is nothing to save: nothing was said, or this chat is private"))
            return
        target = Path(folder).expanduser() if folder else Path.cwd()
        self.run_worker(self._saving(recorder, recorder.conversation, target), group="save")

    async def _saving(self, recorder: HistoryRecorder, number: int, target: Path) -> None:
        try:
            written = await in_thread(lambda: recorder.history().export(number, target), OSError)
        except (LocalvlmError, OSError) as error:
            told = error if isinstance(error, LocalvlmError) else StorageError(f"'{target}' cannot be written: {error}")
            self.warn(told, "error")
            return
        self.notify(f"Written as {shown_path(written)}", markup=False)


def _restored(turns: list[StoredTurn]) -> tuple[list[Exchange], list[LocalvlmError]]:
    """Turns as they are gone on with, and why some of their pictures could not be read."""
    exchanges, lost = [], list[LocalvlmError]()
    for turn in turns:
        attached = []
        for stored in turn.images:
            try:
                if stored.path is None:
                    raise ImageError(f"image {stored.name!r} was of no file", "the answers about it are still there")
                attached.append(from_stored(stored.path, stored.name, stored.page, stored.sha256))
            except LocalvlmError as error:
                lost.append(error)
        exchanges.append(exchange_of(turn, tuple(attached)))
    return exchanges, lost


def _unanswered(exchanges: list[Exchange]) -> list[Attached]:
    """Pictures of the last questions, as far as none of them was answered: they come with the next one. Each once, as
    the newest has it.
    """
    last = [*takewhile(lambda exchange: exchange.status != "done", reversed(exchanges))]
    pictures = (each for exchange in reversed(last) for each in exchange.attached)
    return list({(each.image.name, each.image.content): each for each in pictures}.values())
