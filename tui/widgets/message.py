"""A question and its answer in the chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.events import Key
from textual.message import Message
from textual.widgets import Static

from localvlm.stage_names import STAGE_NAMES

from ..display import displayed
from ..drafts import Fate, fate_of
from ..handing_on import hand_on
from ..rewriting import rewrite
from ..text import one_line, shown_name
from ..told import caption
from .answer_text import AnswerText
from .composer import Prompt

if TYPE_CHECKING:
    from localvlm.answers import Answer
    from localvlm.images import Image

    from ..exchange import Exchange

__all__ = ["AnswerMessage", "Question"]

FATES: dict[Fate, tuple[str, str]] = {
    "waits": ("draft", "the model is asked"),
    "agrees": ("draft", "the model agrees so far"),
    "replaced": ("the guide's draft was", "the model replaced it"),
}
"""What stands before and behind a draft that is shown."""


class ChatMessage(Vertical, can_focus=True):
    """What a turn shows; with the focus, which keys alone give it, some letters do something with it."""

    FOCUS_ON_CLICK = False  # who clicks on what they read and writes on means the text
    DEFAULT_CSS = """
    ChatMessage {
        height: auto;
        margin: 0 0 1 0;
        padding: 0 1;
        border-left: wide $border-blurred;
        & > Static { height: auto; }
        &:focus { border-left: wide $border; background: $surface; }
    }
    """
    BINDINGS = [
        Binding("c", "take('copy')", "copy"),
        Binding("e", "take('edit')", "edit"),
        Binding("r", "take('again')", "again"),
        Binding("up,k", "app.focus_previous", "up", show=False),
        Binding("down,j", "app.focus_next", "down", show=False),
    ]

    class Taken(Message):
        """Somebody wants to ``do`` something with a turn: "copy", "edit" or "again"."""

        def __init__(self, widget: ChatMessage, do: str) -> None:
            super().__init__()
            self.widget, self.do = widget, do

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn

    @property
    def raw(self) -> str:
        """Its text, nothing removed."""
        return ""

    def action_take(self, do: str) -> None:
        self.post_message(self.Taken(self, do))

    def on_click(self) -> None:
        """What is typed goes to the text from here on, unless something was selected."""
        if not self.screen.get_selected_text():
            self.screen.query_one(Prompt).focus()

    def on_key(self, event: Key) -> None:
        """Somebody writes on: a letter that does nothing here goes to the text, as do keys that were behind it."""
        prompt = self.screen.query_one(Prompt)
        letter = event.is_printable and not self._bindings.key_to_bindings.get(event.key)
        if letter or self.screen.focused is prompt:
            hand_on(event, prompt)


class Question(ChatMessage):
    """What was asked, and the pictures that came with it."""

    DEFAULT_CSS = """
    Question {
        border-left: wide $secondary;
        & > .pictures { color: $text-muted; }
        & > .question { text-style: bold; }
    }
    """

    def __init__(self, turn: int, question: str, images: Sequence[Image] = ()) -> None:
        super().__init__(turn)
        self._question, self._images = question, images

    @property
    def raw(self) -> str:
        return self._question

    def compose(self) -> ComposeResult:
        yield Static(Content(displayed(self._question)), classes="question", markup=False)
        if self._images:
            shown = [f"{one_line(shown_name(i.name), 60)} {i.size[0]}\u00d7{i.size[1]}" for i in self._images]
            yield Static(Content("\n".join(f"\u25a3 {name}" for name in shown)), classes="pictures", markup=False)


class AnswerMessage(ChatMessage):
    """An answer as it comes: the guide's draft at once, then what the model makes of it."""

    DEFAULT_CSS = """
    AnswerMessage {
        &.-guide { border-left: wide $guide; }
        &.-model { border-left: wide $model; }
        &.-failed { border-left: wide $error; }
        &.-interrupted { border-left: wide $warning; }
        & > .draft { color: $text-muted; display: none; }
        & > .caption { color: $text-muted; }
        &.-failed > .caption { color: $text-error; }
    }
    """

    def __init__(self, turn: int, again: str = "ctrl+g") -> None:
        """``again``: the key that asks the last question again, whatever has the focus."""
        super().__init__(turn)
        self._again, self._is_last = again, True
        self._broke: Content | None = None
        """What it ended with, if with no answer."""
        self._text: list[str] = []
        self._drafted = ""
        self._stage, self._note = "", ""

    @property
    def raw(self) -> str:
        return "".join(self._text)

    def compose(self) -> ComposeResult:
        yield AnswerText()
        yield Static(classes="draft", markup=False)
        yield Static(Content("waiting"), classes="caption", markup=False)

    # what the app tells

    def asked(self, note: str) -> None:
        """The question is being answered; ``note``: what is different about it."""
        self._note = note

    def stage(self, name: str, seconds: float = 0.0) -> None:
        """A stage began, or goes on for so long since the question was asked."""
        self._stage = STAGE_NAMES.get(name, name)
        self.tick(seconds)

    def tick(self, seconds: float) -> None:
        """Time passes."""
        if self._stage:
            parts = [f"{self._stage}\u2026", f"{seconds:.1f} s" if seconds >= 1 else "", self._note]
            self._caption(Content(" \u00b7 ".join(filter(None, parts))))

    def looked(self, draft: str) -> None:
        """What the guide says, before the model was asked."""
        self._drafted = draft.strip()
        self._show_draft(done=False)

    def text(self, piece: str) -> None:
        """The next piece of the answer."""
        self._text.append(piece)
        self.query_one(AnswerText).feed(piece)
        self._show_draft(done=False)

    async def answered(self, answer: Answer) -> None:
        """The answer is final."""
        if not self._text:
            self.text(answer.text)
        await self._end(f"-{answer.answered_by}")
        if answer.answered_by == "guide":
            self._hide_draft()
            fate: Fate | None = None
        else:
            fate = self._show_draft(done=True)
        self._caption(caption(answer, fate, self._note, hidden=self.query_one(AnswerText).hidden))

    async def interrupted(self) -> None:
        """Somebody stopped it."""
        await self._end("-interrupted")
        self._leave_draft()
        self._break(Content.styled("stopped", "$text-warning"))

    async def failed(self, told: str) -> None:
        """There is no answer, or only a part; ``told`` says why."""
        await self._end("-failed")
        self._leave_draft()
        self._break(Content(one_line(told)))

    def be_last(self, is_last: bool) -> None:
        """Whether it is the newest one, which alone can be asked again."""
        if is_last != self._is_last:
            self._is_last = is_last
            if self._broke is not None:
                self._break(self._broke)

    async def restored(self, exchange: Exchange) -> None:
        """An answer that was given before."""
        self._drafted = (exchange.guide_text or "").strip()
        if exchange.text:
            self.text(exchange.text)
        if exchange.answer is not None:
            await self.answered(exchange.answer)
        elif exchange.status == "interrupted":
            await self.interrupted()
        elif exchange.status == "failed":
            await self.failed("it failed" if exchange.error is None else str(exchange.error))

    # what is shown

    async def _end(self, how: str) -> None:
        self._stage = ""
        await self.query_one(AnswerText).finish()
        self.add_class(how)

    def _break(self, told: Content) -> None:
        self._broke = told
        self._caption(Content.assemble(told, f" \u00b7 {self._again} asks again" if self._is_last else ""))

    def _caption(self, content: Content) -> None:
        rewrite(self.query_one(".caption", Static), content)

    def _hide_draft(self) -> None:
        self.query_one(".draft").display = False

    def _show_draft(self, *, done: bool) -> Fate | None:
        if not self._drafted:
            return None
        fate = fate_of(self._drafted, self.raw, done=done)
        if fate in FATES:
            before, behind = FATES[fate]
            self._write_draft(f"{before}: ", "strike" if fate == "replaced" else "italic", f" \u00b7 {behind}")
        else:
            self._hide_draft()
        return fate

    def _leave_draft(self) -> None:
        """Nobody will say what becomes of it."""
        if self._drafted:
            self._write_draft("the guide's draft was: ", "italic")

    def _write_draft(self, before: str, style: str, behind: str = "") -> None:
        row = self.query_one(".draft", Static)
        row.display = True
        shown = one_line(displayed(self._drafted), 300)
        row.update(Content.assemble((before, "$guide"), (shown, style), (behind, "$text-muted")))
