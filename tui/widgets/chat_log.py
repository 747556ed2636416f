"""The conversation as it is read: questions and answers, oldest first, the newest in sight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.images import Image

    from .message import AnswerMessage, ChatMessage

__all__ = ["ChatLog", "Welcome"]

TIPS = (
    ("ctrl+o", "opens a picture; so does dropping a file here, ctrl+v, or @ and its name"),
    ("enter", "asks; the answer comes here, what was looked at stands beside it"),
    ("ctrl+p", "has everything else; F1 helps"),
)


class Welcome(Static):
    """What can be done, while nothing was said."""

    DEFAULT_CSS = """
    Welcome { height: auto; padding: 1 2; color: $text-muted; }
    """

    def __init__(self, note: str = "") -> None:
        lines = [Content.styled("Ask a picture.", "bold $foreground"), Content("")]
        lines += [Content.assemble((f"{key:>7}", "bold $text-accent"), f"  {what}") for key, what in TIPS]
        lines += [Content(""), Content(sanitize(note))] if note else []
        super().__init__(Content("\n").join(lines), markup=False)


class ChatLog(VerticalScroll, can_focus=False):
    """Holds the messages; keeps to the end while it is there."""

    DEFAULT_CSS = """
    ChatLog { height: 1fr; padding: 1 1 0 1; scrollbar-size-vertical: 1; }
    """

    def __init__(self, note: str = "") -> None:
        super().__init__()
        self._note = note

    def compose(self) -> ComposeResult:
        yield Welcome(self._note)

    def on_mount(self) -> None:
        self.anchor()

    @property
    def last_answer(self) -> str:
        """The newest answer as the model wrote it, "" if there is none."""
        answers: list[AnswerMessage] = list(self.query("AnswerMessage"))  # type: ignore[arg-type]
        return answers[-1].raw if answers else ""

    async def add(self, turn: int, question: str, images: Sequence[Image]) -> AnswerMessage:
        """A question, and the message in which its answer will be."""
        from .message import AnswerMessage, Question  # with Markdown, which the first frame does not wait for

        self.query(Welcome).set(display=False)
        answer = AnswerMessage(turn)
        await self.mount_all([Question(turn, question, images), answer])
        self.anchor()
        return answer

    def answer(self, turn: int) -> AnswerMessage | None:
        """The message of a turn, None where it was taken back."""
        answers: Iterable[AnswerMessage] = self.query("AnswerMessage")  # type: ignore[assignment]
        return next((m for m in answers if m.turn == turn), None)

    async def remove_turn(self, turn: int) -> None:
        """Takes a turn's messages away."""
        messages: list[ChatMessage] = list(self.query("ChatMessage"))  # type: ignore[arg-type]
        for message in messages:
            if message.turn == turn:
                await message.remove()
        self._greet()

    async def clear(self) -> None:
        """Takes all messages away."""
        await self.query("ChatMessage").remove()
        self._greet()

    def _greet(self) -> None:
        self.query(Welcome).set(display=not self.query("ChatMessage"))
