"""Pictures: from a path, a paste, a file that is dropped, the clipboard or the browser, to a chip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on

from localvlm.errors import LocalvlmError, UsageError

from .attachments import MOST, Attached, from_clipboard, from_name
from .background import in_thread
from .parts import ChatParts
from .text import one_line
from .widgets.chips import Chip, Chips
from .widgets.composer import Prompt

if TYPE_CHECKING:
    from .screens.images import Place

__all__ = ["PictureActions"]


class PictureActions(ChatParts):
    """Pictures are read in threads, beside what goes on; a question that was sent meanwhile waits for them."""

    _place: Place | None = None
    _waits: str | None = None

    async def send(self, question: str) -> None:
        """Asks, or waits until all pictures were read."""
        raise NotImplementedError

    async def attach_name(self, name: str) -> None:
        """Adds the pictures that a name stands for; they are read beside what goes on."""
        await self.attach_names([name])

    async def attach_names(self, names: Sequence[str]) -> None:
        """The same for several, as far as they are not too many."""
        chips = self.query_one(Chips)
        room = max(0, MOST - len(chips.chips))
        for name in names[:room]:
            self._read_named(await chips.begin(name), name)
        if left := len(names[room:]):
            told = f"a question takes at most {MOST} pictures, and {left} more {'was' if left == 1 else 'were'} given"
            self.warn(UsageError(told, "`localvlm ask --jsonl` asks about each of many"))

    def read_first(self) -> None:
        """Reads the pictures that the chat was started with; their chips have been there since its first frame, for a
        question that is sent before they are read.
        """
        for chip in self.query_one(Chips).first:
            self._read_named(chip, chip.named)

    def _read_named(self, chip: Chip, name: str) -> None:
        """Of several pictures that a name stands for, those that can be read."""
        unread: list[LocalvlmError] = []
        self._read(chip, partial(from_name, name, unread), unread=unread)

    def _read(
        self,
        chip: Chip,
        read: Callable[[], list[Attached]],
        failed: Callable[[LocalvlmError], None] | None = None,
        unread: list[LocalvlmError] | None = None,
    ) -> None:
        """Reads beside what goes on; ``failed`` tells why that could not be, if not :meth:`warn`. ``unread`` is where
        ``read`` puts that of some of them.
        """
        tell = failed or partial(self.warn, severity="error")
        self.run_worker(self._reading(chip, read, tell, [] if unread is None else unread), group="pictures")

    async def _reading(
        self,
        chip: Chip,
        read: Callable[[], list[Attached]],
        failed: Callable[[LocalvlmError], None],
        unread: list[LocalvlmError],
    ) -> None:
        chips = self.query_one(Chips)
        try:
            attached = await in_thread(read)
        except LocalvlmError as error:
            attached = []
            unread.append(error)
        for why in unread:
            self.wait_no_more()
            failed(why)
        await chips.replace(chip, attached)
        for note in (f"{each.image.name}: {note}" for each in attached for note in each.image.notes):
            self.notify(one_line(note), markup=False)
        if self._waits is not None and not chips.reading:
            question, self._waits = self._waits, None
            if self.composer.text.strip() == question:
                self.composer.prompt.load_text("")
                self.call_later(self.send, question)  # what comes of it is told behind that it is shown
            else:  # somebody writes on: it is sent when they say so
                self.status("ready")

    def wait_no_more(self) -> None:
        """A question that waits for its pictures is not asked by itself."""
        if self._waits is not None:
            self._waits = None
            self.status("not asked yet")

    @on(Chips.Changed)
    def _pictures_changed(self) -> None:
        self.show_pictures()

    @on(Prompt.Dropped)
    async def _dropped(self, event: Prompt.Dropped) -> None:
        await self.attach_names(event.names)

    async def action_attach(self, name: str = "") -> None:
        """Adds the picture of that name."""
        await self.attach_name(name)

    async def action_paste_picture(self) -> None:
        """Adds the picture in the clipboard."""
        chip = await self.query_one(Chips).begin("(clipboard)")
        self._read(chip, from_clipboard)

    @on(Prompt.Pasting)
    async def _pasting(self) -> None:
        """A picture, if the desktop's clipboard holds one; else the text that was copied here."""
        chip = await self.query_one(Chips).begin("(clipboard)")
        self._read(chip, from_clipboard, self._no_picture)

    def _no_picture(self, error: LocalvlmError) -> None:
        if self.clipboard:
            self.composer.prompt.paste_text()
        else:
            self.warn(error)

    @on(Prompt.TooLong)
    def _too_long(self) -> None:
        self.notify("The paste was cut: it is too long for a question.", severity="warning", markup=False)

    def action_open_image(self) -> None:
        """Picks pictures from folders."""
        from .screens.images import ImageBrowser, Place

        if self._place is None:
            self._place = Place(Path.cwd())
        self.push_screen(ImageBrowser(self._place), self._picked)

    async def _picked(self, paths: list[Path] | None) -> None:
        await self.attach_names([str(path) for path in paths or ()])
