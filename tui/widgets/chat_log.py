"""The conversation as it is read: questions and answers, oldest first, the newest in sight, the oldest folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from localvlm.sanitize import sanitize

from ..keymap import key_of

if TYPE_CHECKING:
    from localvlm.images import Image

    from .message import AnswerMessage, ChatMessage

__all__ = ["STEP", "ChatLog", "Earlier", "Welcome"]

TIPS = (
    ("open-image", "opens a picture; so does dropping a file here, ctrl+v, or @ and its name"),
    ("send", "asks; the answer comes here, what was looked at stands beside it"),
    ("palette", "has everything else; {help} helps"),
)
"""Actions of the keymap and what they do."""

MOST = 20
"""Turns that are shown: what one more costs grows with those there are, and every key waits for it."""
STEP = 20
"""Earlier ones that are shown when somebody asks for them."""


class Welcome(Static):
    """What can be done, while nothing was said."""

    DEFAULT_CSS = """
    Welcome { height: auto; padding: 1 2; color: $text-muted; }
    """

    def __init__(self, note: str = "", keymap: Mapping[str, str] = {}) -> None:
        lines = [Content.styled("Ask a picture.", "bold $foreground"), Content("")]
        tips = {key_of(name, keymap): what.format(help=key_of("help", keymap)) for name, what in TIPS}
        width = max(7, *map(len, tips))
        lines += [Content.assemble((key.rjust(width), "bold $text-accent"), f"  {what}") for key, what in tips.items()]
        lines += [Content(""), Content(sanitize(note))] if note else []
        super().__init__(Content("\n").join(lines), markup=False)


class Earlier(Static, can_focus=True):
    """Stands for the turns that are folded."""

    DEFAULT_CSS = """
    Earlier {
        height: 1;
        margin-bottom: 1;
        padding: 0 1;
        color: $text-muted;
        display: none;
        &:focus { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
    }
    """
    BINDINGS = [
        Binding("enter,space", "show", "show them"),
        Binding("down,j", "app.focus_next", "down", show=False),
    ]

    class Wanted(Message):
        """Somebody wants to read them."""

    def __init__(self) -> None:
        super().__init__(markup=False)
        self.n = 0

    def tell(self, n: int) -> None:
        """So many are folded."""
        self.n, self.display = n, n > 0
        self.update(Content(f"\u25b4 {n} earlier turn{'s' * (n != 1)} \u00b7 enter shows {min(n, STEP)}"))

    def action_show(self) -> None:
        self.post_message(self.Wanted())

    def on_click(self) -> None:
        self.action_show()


class ChatLog(VerticalScroll, can_focus=False):
    """Holds the messages of the last MOST turns, and of more where somebody asked for them; keeps to the end while it
    is there.
    """

    DEFAULT_CSS = """
    ChatLog { height: 1fr; padding: 1 1 0 1; scrollbar-size-vertical: 1; }
    """

    def __init__(self, note: str = "", keymap: Mapping[str, str] = {}) -> None:
        super().__init__()
        self._note, self._keymap = note, keymap

    def compose(self) -> ComposeResult:
        yield Welcome(self._note, self._keymap)
        yield Earlier()

    def on_mount(self) -> None:
        self.anchor()

    @property
    def last_answer(self) -> str:
        """The newest answer as the model wrote it, "" if there is none."""
        answers: list[AnswerMessage] = list(self.query("AnswerMessage"))  # type: ignore[arg-type]
        return answers[-1].raw if answers else ""

    @property
    def turns(self) -> list[int]:
        """Those that are shown, oldest first."""
        answers: Iterable[AnswerMessage] = self.query("AnswerMessage")  # type: ignore[assignment]
        return [message.turn for message in answers]

    async def add(self, turn: int, question: str, images: Sequence[Image]) -> AnswerMessage:
        """A question, and the message in which its answer will be; what is more than MOST goes (:meth:`fold`)."""
        answer = await self._mounted(turn, question, images)
        await self._remove(self.turns[:-MOST])
        self.anchor()
        return answer

    async def add_earlier(self, turn: int, question: str, images: Sequence[Image]) -> AnswerMessage:
        """The same above all that are shown: the newest of the turns that are folded."""
        return await self._mounted(turn, question, images, after=self.query_one(Earlier))

    async def _mounted(
        self, turn: int, question: str, images: Sequence[Image], after: Earlier | None = None
    ) -> AnswerMessage:
        from .message import AnswerMessage, Question  # with Markdown, which the first frame does not wait for

        self.query(Welcome).set(display=False)
        answer = AnswerMessage(turn, key_of("regenerate", self._keymap))
        await self.mount_all([Question(turn, question, images), answer], after=after)
        self._mark_last()
        return answer

    @property
    def folded(self) -> int:
        """Turns before those that are shown."""
        return self.query_one(Earlier).n

    def fold(self, n: int) -> None:
        """So many turns came before those that are shown."""
        self.query_one(Earlier).tell(n)
        self._greet()

    def answer(self, turn: int) -> AnswerMessage | None:
        """The message of a turn, None where it was taken back."""
        answers: Iterable[AnswerMessage] = self.query("AnswerMessage")  # type: ignore[assignment]
        return next((m for m in answers if m.turn == turn), None)

    async def remove_turn(self, turn: int) -> None:
        """Takes a turn's messages away."""
        await self._remove([turn])

    async def clear(self) -> None:
        """Takes all messages away."""
        await self.query("ChatMessage").remove()
        self.fold(0)

    async def _remove(self, turns: Sequence[int]) -> None:
        messages: list[ChatMessage] = list(self.query("ChatMessage"))  # type: ignore[arg-type]
        for message in messages:
            if message.turn in turns:
                await message.remove()
        self._mark_last()

    def _mark_last(self) -> None:
        answers: list[AnswerMessage] = list(self.query("AnswerMessage"))  # type: ignore[arg-type]
        for answer in answers:
            answer.be_last(answer is answers[-1])

    def _greet(self) -> None:
        self.query(Welcome).set(display=not self.query("ChatMessage") and not self.folded)
