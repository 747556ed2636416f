"""Where questions are written, with the pictures that come with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import TextArea

from ..attachments import pasted_names
from ..commands import begun
from ..paths import is_picture, mentions
from .chips import Chip, Chips
from .in_order import act_in_order
from .path_completion import PathCompletion

__all__ = ["Composer", "Prompt", "mentioned"]

MOST = 100_000
"""Characters of a question."""
ASK = "Ask about the picture"
EDITING = "edit the last question \u00b7 esc leaves it as it is"


class Prompt(TextArea):
    """The text; enter sends it."""

    DEFAULT_CSS = """
    Prompt {
        height: auto;
        max-height: 8;
        min-height: 1;
        padding: 0;
        border: none;
        background: transparent;
        &:focus { border: none; }
        & .text-area--cursor-line { background: transparent; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "send", id="send"),
        Binding("shift+enter,ctrl+j,alt+enter", "newline", "new line", id="newline"),
    ]

    class Sent(Message):
        """The text, which is there no more, is to be sent."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Emptied(Message):
        """Somebody pressed up in an empty text, to have the last question back."""

    class Dropped(Message):
        """Paths of pictures were pasted, or files dropped on the terminal."""

        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.names = names

    class Pasting(Message):
        """What the clipboard of the desktop holds is wanted."""

    class TooLong(Message):
        """A paste was cut."""

    def __init__(self) -> None:
        super().__init__(
            soft_wrap=True, show_line_numbers=False, compact=True, highlight_cursor_line=False, placeholder=ASK
        )

    @property
    def before(self) -> str:
        """The text up to the cursor."""
        return self.get_text_range((0, 0), self.cursor_location)

    def pressed(self, key: str) -> bool:
        """Whether a key was for what the text may become: a path behind an @, or a command."""
        if self.screen.query_one(PathCompletion).press(key, len(self.before)):
            return True
        if key == "tab" and (found := begun(self.text)):
            self.load_text(f"/{found[0].name} ")
            self.move_cursor(self.document.end)
            return True
        return False

    async def _on_key(self, event: events.Key) -> None:
        if self.pressed(event.key):
            event.stop()
            event.prevent_default()
        elif not await act_in_order(self, event):
            await super()._on_key(event)

    def action_send(self) -> None:
        if self.text.strip():
            self.post_message(self.Sent(self.text))
            self.load_text("")

    def action_newline(self) -> None:
        self.insert("\n")

    def action_cursor_up(self, select: bool = False) -> None:
        if not self.text and not select:
            self.post_message(self.Emptied())
        else:
            super().action_cursor_up(select)

    def action_paste(self) -> None:
        self.post_message(self.Pasting())

    def paste_text(self) -> None:
        """What the app itself copied, where the desktop's clipboard holds no picture."""
        super().action_paste()

    def action_copy(self) -> None:
        if self.selected_text:
            super().action_copy()
        else:
            self.app.post_message(Composer.Interrupt())

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        self.take_paste(event.text)

    def take_paste(self, text: str) -> None:
        """Writes what was pasted, or tells that it is pictures."""
        if names := pasted_names(text):
            self.post_message(self.Dropped(names))
            return
        room = MOST - len(self.text)
        if len(text) > room:
            self.post_message(self.TooLong())
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.replace(text[: max(0, room)], *self.selection, maintain_selection_offset=False)


class Composer(Vertical):
    """Chips above a text that grows with what is written. ``reading``: pictures that are about to be read."""

    DEFAULT_CSS = """
    Composer {
        height: auto;
        padding: 0 1;
        border: round $border-blurred;
        border-title-color: $text-muted;
        border-subtitle-color: $text-muted;
        background: $surface;
        &:focus-within { border: round $border; }
        &.-editing { border: round $warning; border-title-color: $text-warning; }
    }
    """

    class Submitted(Message):
        """A question, or a command; :meth:`give_back` what cannot be taken."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Interrupt(Message):
        """Ctrl-C where there is nothing to copy."""

    editing = False
    """Whether the text will take the place of the last question."""

    def __init__(self, folder: Path | None = None, reading: Sequence[str] = ()) -> None:
        super().__init__()
        self._folder, self._reading = folder or Path(), reading

    def compose(self) -> ComposeResult:
        yield Chips(self._reading)
        yield Prompt()
        yield PathCompletion(self._folder)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def chips(self) -> Chips:
        return self.query_one(Chips)

    @property
    def text(self) -> str:
        return self.prompt.text

    def edit(self, text: str) -> None:
        """Writes ``text``, which will take the place of the last question."""
        self._edit(True)
        self.write(text)

    def write(self, text: str) -> None:
        """Puts ``text`` in place of what is written."""
        self.prompt.load_text(text)
        self.prompt.move_cursor(self.prompt.document.end)
        self.prompt.focus()

    def clear(self) -> None:
        """Empties the text; pictures stay."""
        self.prompt.load_text("")
        self._edit(False)

    def give_back(self, text: str) -> None:
        """Writes a text before what was written meanwhile."""
        self.prompt.replace(text, (0, 0), (0, 0), maintain_selection_offset=False)
        self.prompt.move_cursor(self.prompt.document.end)

    def take_mentions(self) -> list[str]:
        """The pictures that the text names behind an @, which are then written there no more."""
        text, names = mentioned(self.text)
        if names:
            self.write(text)
        return names

    def leave_edit(self) -> None:
        """What is written takes the place of nothing."""
        self._edit(False)

    def _edit(self, editing: bool) -> None:
        self.editing = editing
        self.set_class(editing, "-editing")
        self.border_title = EDITING if editing else None

    @on(Prompt.SelectionChanged)
    def _look(self) -> None:
        self.query_one(PathCompletion).look(self.prompt.before)

    @on(PathCompletion.Taken)
    def _path_taken(self, event: PathCompletion.Taken) -> None:
        """A folder is gone on with; a picture becomes a chip."""
        event.stop()
        prompt = self.prompt
        start, end = (_location(prompt.text, at) for at in (event.start, event.end))
        prompt.replace(event.text, start, end, maintain_selection_offset=True)
        prompt.focus()
        if not event.text.rstrip("'").endswith("/") and (names := self.take_mentions()):
            self.post_message(Prompt.Dropped(names))

    @on(Prompt.Sent)
    def _sent(self, event: Prompt.Sent) -> None:
        event.stop()
        self.post_message(self.Submitted(event.text))

    @on(Chip.Removed)
    async def _removed(self, event: Chip.Removed) -> None:
        event.stop()
        await self.chips.drop(event.chip)
        if not self.chips.chips:
            self.prompt.focus()

    @on(Chip.Left)
    def _left(self, event: Chip.Left) -> None:
        event.stop()
        self.prompt.focus()


def _location(text: str, index: int) -> tuple[int, int]:
    """(row, column) of a character of a text."""
    before = text[:index].split("\n")
    return len(before) - 1, len(before[-1])


def mentioned(text: str) -> tuple[str, list[str]]:
    """What is left of a text without the pictures that it names behind an @, and these."""
    left, names = text, list[str]()
    for mention in reversed(list(mentions(text))):
        if is_picture(mention.path.partition("#")[0]):
            names.insert(0, mention.written)
            left = f"{left[: mention.start].rstrip()} {left[mention.end :].lstrip()}".strip()
    return left, names
