"""The conversation as it is read: questions and answers, oldest first, the newest in sight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from .message import AnswerMessage, ChatMessage, Question

if TYPE_CHECKING:
    from localvlm.images import Image

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
        lines += [Content(""), Content(note)] if note else []
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

    async def add(self, turn: int, question: str, images: Sequence[Image]) -> AnswerMessage:
        """A question, and the message in which its answer will be."""
        self.query(Welcome).set(display=False)
        answer = AnswerMessage(turn)
        await self.mount_all([Question(turn, question, images), answer])
        self.anchor()
        return answer

    def answer(self, turn: int) -> AnswerMessage | None:
        """The message of a turn, None where it was taken back."""
        return next((m for m in self.query(AnswerMessage) if m.turn == turn), None)

    async def remove_turn(self, turn: int) -> None:
        """Takes a turn's messages away."""
        for message in [m for m in self.query(ChatMessage) if m.turn == turn]:
            await message.remove()
        self._greet()

    async def clear(self) -> None:
        """Takes all messages away."""
        await self.query(ChatMessage).remove()
        self._greet()

    def _greet(self) -> None:
        self.query(Welcome).set(display=not self.query(ChatMessage))
