"""What all screens over the chat have in common: a box with a title, its keys below, and esc, which closes it."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual import events
from textual.actions import SkipAction
from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from localvlm.errors import LocalvlmError

from ..background import Workers
from ..text import one_line
from ..widgets.in_order import act_in_order
from ..widgets.key_hints import KeyHints

__all__ = ["MUTED", "Dialog", "Notice", "Rows", "told_error"]

MUTED = "auto 75%"
"""Style of what is less important in a list: a shade of whatever can be read on the row's background."""

Result = TypeVar("Result")


def told_error(error: LocalvlmError) -> str:
    """An error and its hint in one line, as the command line tells it."""
    return one_line(f"{error.message} ({error.hint})" if error.hint else error.message)


class Notice(Static):
    """A line of news below a screen's content, which is not there while it is empty."""

    DEFAULT_CSS = """
    Notice {
        height: auto;
        max-height: 4;
        padding: 0 1;
        display: none;
        &.-filled { display: block; }
        &.-error { color: $text-error; }
    }
    """

    def tell(self, text: str, *, error: bool = False) -> None:
        """Shows ``text``, which is no markup; "" takes the line away."""
        self.update(Content(text))
        self.set_class(bool(text), "-filled").set_class(error, "-error")


class Rows(OptionList):
    """A list of texts that are no markup; what is chosen stays in view, whatever becomes of the screen."""

    def __init__(self) -> None:
        super().__init__(markup=False)

    async def _on_key(self, event: events.Key) -> None:
        await act_in_order(self, event)

    def on_resize(self) -> None:
        self.call_after_refresh(self.scroll_to_highlight)


class Dialog(Workers, ModalScreen[Result]):
    """A modal screen. Subclasses yield their widgets in ``body`` and name themselves in ``heading``.

    On terminals of less than 60 columns or 20 rows it takes all of the screen, and gives up its frame.
    """

    heading = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "close")]
    DEFAULT_CSS = """
    Dialog {
        align: center middle;
        background: $background 70%;
        #dialog {
            width: 90%;
            max-width: 100;
            height: 85%;
            background: $surface;
            border: round $border;
            border-title-color: $foreground;
            border-title-style: bold;
            border-subtitle-color: $foreground-muted;
            padding: 0 1;
        }
        &.-narrow #dialog, &.-short #dialog {
            width: 100%;
            max-width: 100%;
            height: 100%;
            border: none;
            border-top: solid $border;
            padding: 0;
        }
        &.-small #dialog {
            width: 72;
            max-width: 100%;
            height: auto;
            border: round $border;
            max-height: 100%;
        }
        OptionList, OptionList:focus {
            border: none;
            padding: 0;
            height: 1fr;
            background: $surface;
            background-tint: $foreground 0%;
            scrollbar-size-vertical: 1;
            text-wrap: nowrap;
            text-overflow: ellipsis;
        }
        Input, Input:focus {
            border: none;
            border-left: outer $border-blurred;
            height: 1;
            padding: 0 1;
            background: $panel;
        }
        Input:focus { border-left: outer $border; }
        Input.-wrong, Input.-wrong:focus { border-left: outer $error; }
        VerticalScroll { scrollbar-size-vertical: 1; }
        Input > .input--placeholder { color: $text-muted; }
    }
    """

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog") as box:
            box.border_title = Content(self.heading)
            yield from self.body()
            yield Notice(id="notice")
            yield KeyHints()

    def body(self) -> ComposeResult:
        """The widgets between title and keys."""
        raise NotImplementedError

    def tell(self, text: str, *, error: bool = False) -> None:
        """A line of news above the keys; "" takes it away."""
        self.query_one(Notice).tell(text, error=error)

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """As Textual's, and only once: a key may be pressed again before the screen is gone."""
        return super().dismiss(result) if self.is_active else AwaitComplete()

    def action_enter(self) -> None:
        """Enter is bound to a screen only to be told among its keys: the widget in focus has it, in its turn, behind
        the keys that were pressed before.
        """
        raise SkipAction

    def action_close(self) -> None:
        self.dismiss(None)
