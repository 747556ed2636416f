"""What the parts of the chat's app share: the conversation, its options, and the widgets that tell of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.app import App

from localvlm.errors import LocalvlmError

from .background import Workers
from .conversation import Conversation
from .events import Opened
from .recorder import HistoryRecorder
from .setup import ChatSetup
from .widgets.chat_log import ChatLog
from .widgets.chips import Chips
from .widgets.composer import Composer
from .widgets.status_line import StatusLine

if TYPE_CHECKING:
    from localvlm.answers import AskOptions

    from .widgets.saw_panel import SawPanel

__all__ = ["ChatParts"]


class ChatParts(Workers, App[int]):
    """The app without anything that can be done in it."""

    setup: ChatSetup
    conversation: Conversation
    recorder: HistoryRecorder | None
    options: AskOptions | None = None
    """What questions are asked with, once a pair is open."""
    own_options: AskOptions | None = None
    """The same if nobody says otherwise here."""
    resuming = False
    """A conversation of the history is being read, which will take the place of this one."""
    turn_told = 0
    """The turn that the panel and the line at the bottom tell of, 0: none."""

    # what the other half has

    def warn(self, error: LocalvlmError, severity: str = "warning") -> None:
        """Tells an error in passing."""
        raise NotImplementedError

    def status(self, text: str) -> None:
        """What the line at the bottom says."""
        raise NotImplementedError

    @property
    def log_view(self) -> ChatLog:
        return self.query_one(ChatLog)

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    def panel(self, tell: Callable[[SawPanel], None]) -> None:
        """Tells the side panel something, if it is there yet."""
        for panel in self.query("SawPanel"):
            tell(panel)  # type: ignore[arg-type]

    def opened(self, event: Opened) -> None:
        """A pair can be asked."""
        self.own_options = event.options
        self.query_one(StatusLine).tell("ready", pair=event.pair)
        self._options_changed()

    def set_options(self, *, tell: bool = True, **changes: Any) -> None:
        """Sets what the next question is asked with; ``tell``: the panel, which knows of what was chosen there."""
        self.conversation.set(**changes)
        self._options_changed(tell=tell)

    def unset_options(self, *names: str) -> None:
        """These are again what the pair has them be."""
        self.conversation.unset(*names)
        self._options_changed()

    def _options_changed(self, *, tell: bool = True) -> None:
        if self.own_options is not None:
            options = self.options = replace(self.own_options, **self.conversation.changes)
            if tell:
                self.panel(lambda panel: panel.set_options(options))

    def show_pictures(self) -> None:
        """Tells the side panel which pictures there are: those said, and those that come with the next question, once
        where they are both, as in an edit.
        """
        said = [e for e in self.conversation.exchanges if e.status in ("done", "waiting")]
        images = [image for exchange in said for image in exchange.images]
        there = {id(image) for image in images}
        images += [each.image for each in self.query_one(Chips).attached if id(each.image) not in there]
        self.panel(lambda panel: panel.show_images(images))
