"""Questions with two answers, and texts of one line."""

from __future__ import annotations

from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Button, Static

from localvlm.sanitize import sanitize

from ..text import one_line
from ..widgets.in_order import Line
from .dialog import Dialog

__all__ = ["ConfirmScreen", "EditScreen"]


class ConfirmScreen(Dialog[bool]):
    """Asks, with two buttons; True is "yes". ``danger``: what "yes" does cannot be undone, so "no" has the focus."""

    heading = "Sure?"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n", "answer(False)", "no"),
        Binding("left,right,up,down", "other", "choose", show=False),
    ]
    DEFAULT_CSS = """
    ConfirmScreen {
        #question { height: auto; padding: 1; text-wrap: wrap; }
        &.-short #question { padding: 0 1; }
        Horizontal { height: 1; padding: 0 1; margin-bottom: 1; }
        &.-short Horizontal { margin-bottom: 0; }
        Button.-style-default.-textual-compact {
            margin-right: 2;
            min-width: 10;
            background: $panel;
            color: $foreground;
            text-style: none;
            &.-error { background: $panel; color: $text-error; }
            &:focus {
                background: $block-cursor-background;
                color: $block-cursor-foreground;
                background-tint: $foreground 0%;
                text-style: bold;
            }
            &.-error:focus { background: $error; color: $button-color-foreground; }
        }
    }
    """

    def __init__(self, text: str, yes: str = "Yes", no: str = "No", *, danger: bool = False) -> None:
        super().__init__(classes="-small")
        self._text, self._yes, self._no, self._danger = sanitize(text), yes, no, danger

    def body(self) -> ComposeResult:
        yield Static(self._text, id="question", markup=False)
        with Horizontal():
            yield Button(self._yes, id="yes", variant="error" if self._danger else "default", compact=True)
            yield Button(self._no, id="no", compact=True)

    def on_mount(self) -> None:
        self.query_one("#no" if self._danger else "#yes").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)

    def action_other(self) -> None:
        self.focus_next()

    def action_close(self) -> None:
        self.dismiss(False)


class EditScreen(Dialog[str]):
    """A text of one line to change; the result is the new text, without white space around it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "submit", "save", priority=True)]

    def __init__(self, heading: Literal["Rename", "Save as", "Edit"], text: str, *, empty: bool = False) -> None:
        super().__init__(classes="-small")
        self.heading, self._text, self._empty = heading, one_line(text), empty

    def body(self) -> ComposeResult:
        yield Line(self._text)

    def action_submit(self) -> None:
        """Takes the text, keys and all that were pressed before."""
        self.query_one(Line).call_later(self._take)

    def _take(self) -> None:
        """Takes the text, unless it is empty where that means nothing."""
        text = self.query_one(Line).value.strip()
        if text or self._empty:
            self.dismiss(text)
        else:
            self.tell("write something, or press esc", error=True)
