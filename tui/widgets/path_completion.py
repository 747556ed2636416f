"""What an ``@`` in a message may become: paths of pictures and folders, below the text that is being written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from localvlm.errors import LocalvlmError

from ..background import in_thread
from ..paths import Mention, candidates, mention_before, written

__all__ = ["PathCompletion"]


class PathCompletion(OptionList, can_focus=False):
    """A list that is there while the text before the cursor ends in an ``@`` and a part of a path.

    The composer keeps the focus: it calls :meth:`look` whenever text or cursor changed, and :meth:`press` with each key
    before it acts on it. What is taken comes as :class:`Taken`.
    """

    DEFAULT_CSS = """
    PathCompletion {
        display: none;
        height: auto;
        max-height: 8;
        border: none;
        padding: 0;
        background: $panel;
        scrollbar-size-vertical: 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        &.-open { display: block; }
        & > .option-list--option-highlighted {
            color: $block-cursor-foreground;
            background: $block-cursor-background;
            text-style: $block-cursor-text-style;
        }
    }
    """

    class Taken(Message):
        """``text`` is to stand in place of ``start`` to ``end`` of the text before the cursor."""

        def __init__(self, start: int, end: int, text: str) -> None:
            super().__init__()
            self.start, self.end, self.text = start, end, text

    def __init__(self, folder: Path) -> None:
        super().__init__(markup=False)
        self.folder = folder
        self._mention: Mention | None = None
        self._refused: int | None = None
        self._found: list[str] = []

    @property
    def open(self) -> bool:
        return self.has_class("-open")

    def look(self, before: str) -> None:
        """Shows what the end of ``before``, the text up to the cursor, may become; soon, as folders take a while."""
        mention = mention_before(before)
        if mention is None or mention.start == self._refused:
            self._refused = None if mention is None else self._refused
            self._show(None, [])
            return
        self._refused = None
        self.run_worker(self._list(mention), exclusive=True)

    async def _list(self, mention: Mention) -> None:
        try:
            found = await in_thread(partial(candidates, mention.path, self.folder))
        except LocalvlmError:  # a help that is not there is no reason to disturb
            found = []
        self._show(mention, [] if found == [mention.path] else found)

    def _show(self, mention: Mention | None, found: list[str]) -> None:
        if mention is None:
            self.workers.cancel_node(self)
        self._mention, self._found = mention, found
        self.set_options([Option(path) for path in found])
        self.set_class(bool(found), "-open")
        if found:
            self.highlighted = 0

    def press(self, key: str, cursor: int) -> bool:
        """Acts on a key of an open list; whether it did, and the composer has nothing to do. ``cursor``: how many
        characters are before it, which may be more than when it was listed.
        """
        if not self.open or self._mention is None:
            return False
        if key in ("up", "down"):
            self.action_cursor_up() if key == "up" else self.action_cursor_down()
        elif key in ("tab", "enter"):
            self._take(self._mention.start, cursor, self._found[self.highlighted or 0])
        elif key == "escape":
            self._refused = self._mention.start
            self._show(None, [])
        else:
            return False
        return True

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if self._mention is not None:
            self._take(self._mention.start, self._mention.end, self._found[event.option_index])

    def _take(self, start: int, end: int, path: str) -> None:
        self._show(None, [])
        self.post_message(self.Taken(start, end, f"@{written(path)}"))
