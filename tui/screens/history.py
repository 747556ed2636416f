"""The history browser: conversations that were kept, searched as one types, to resume, rename, delete and export."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localvlm.errors import LocalvlmError

from ..background import in_thread
from ..handing_on import hand_on
from ..text import one_line, shown_path
from ..widgets.in_order import Line
from .confirm import ConfirmScreen, EditScreen
from .dialog import MUTED, Dialog, Rows, told_error

__all__ = ["Conversation", "HistoryScreen", "Kept", "Turn"]

MOST = 200
"""Conversations that are listed; a search finds the others."""
_T = TypeVar("_T")


class Turn(Protocol):
    """What the preview shows of :class:`localvlm.history.StoredTurn`."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...


class Conversation(Protocol):
    """What is shown of :class:`localvlm.history.ConversationSummary`."""

    @property
    def id(self) -> int: ...
    @property
    def title(self) -> str: ...
    @property
    def pair(self) -> str | None: ...
    @property
    def turns(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def updated(self) -> float:
        """Seconds since 1970."""


class Kept(Protocol):
    """The part of :class:`localvlm.history.History` that is used here; all of it is called from threads."""

    def conversations(self, query: str = "", limit: int = MOST) -> Sequence[Conversation]: ...
    def count(self, query: str = "") -> int: ...
    def turns(self, conversation: int) -> Sequence[Turn]: ...
    def rename(self, conversation: int, title: str) -> object: ...
    def delete(self, conversation: int) -> object: ...
    def export(self, conversation: int, folder: Path) -> Path: ...


class _Listed(Rows):
    """The list. What is typed behind "/" is text of the search, and no key of the list, however fast it comes."""

    async def _on_key(self, event: events.Key) -> None:
        line = self.screen.query_one(Line)
        if self.screen.focused is line:  # it was on its way here when the search got the focus
            hand_on(event, line)
        elif event.key == "slash":
            event.stop()
            event.prevent_default()
            self.screen.set_focus(line)
        else:
            await super()._on_key(event)


class HistoryScreen(Dialog[int]):
    """Dismissed with the id of the conversation to resume.

    Args:
        history: see :class:`Kept`.
        folder: exported conversations are written below it.
        now: seconds since 1970, for "today" and "yesterday".
    """

    heading = "History"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "enter", "resume", priority=True),
        Binding("down", "into_list", "choose", key_display="\u2193", priority=True),
        Binding("r", "rename", "rename"),
        Binding("d,delete", "delete", "delete", key_display="d"),
        Binding("e", "export", "export"),
        Binding("slash", "search", "search", key_display="/"),
    ]
    DEFAULT_CSS = """
    HistoryScreen {
        #preview { height: 4; padding: 0 1; border-top: solid $border-blurred; }
        &.-short #preview { display: none; }
    }
    """

    def __init__(self, history: Kept, folder: Path, now: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._history, self._folder, self._now = history, folder, now
        self._shown: dict[str, Conversation] = {}
        self._listed: str | None = None
        """What the conversations that are shown were searched by."""
        self._wanted = False
        """The first is to be resumed as soon as they are those that are searched."""
        self._one_at_a_time = asyncio.Lock()

    def body(self) -> ComposeResult:
        yield Line(placeholder="search questions, answers and titles")
        yield _Listed()
        yield Static(id="preview", markup=False)

    def on_mount(self) -> None:
        self._look()

    # ---- what is there

    @on(Input.Changed)
    def _look(self) -> None:
        query, self._wanted = self.query_one(Input).value, False
        self.run_worker(partial(self._list, query), exclusive=True, group="list")

    async def _list(self, query: str, at: int = 0) -> None:
        listed = await self._asked(partial(self._found, query))
        if listed is None:
            self._wanted = False
            return
        found, there = listed
        of = f" \u00b7 {len(found)} of {there:,}" if there > len(found) else ""
        self.query_one("#dialog").border_title = Content(f"{self.heading}{of}")
        self._shown, self._listed = {str(one.id): one for one in found}, query
        options = self.query_one(OptionList)
        options.set_options([Option(self._row(one), id=str(one.id)) for one in found])
        if found:
            options.highlighted = min(at, len(found) - 1)
        else:
            nothing = "nothing of that is in the history" if query.strip() else "nothing is in the history yet"
            options.add_option(Option(Content.styled(nothing, MUTED), disabled=True))
            self.query_one("#preview", Static).update("")
        self.refresh_bindings()
        if self._wanted and query == self.query_one(Input).value:
            self._resume()

    def _found(self, query: str) -> tuple[Sequence[Conversation], int]:
        """Those that are listed, and how many there are; in a thread."""
        found = self._history.conversations(query, MOST)
        return found, self._history.count(query) if len(found) == MOST else len(found)

    def _row(self, one: Conversation) -> Content:
        about = [_day(one.updated, self._now()), one_line(one.pair or "files", 24), _counted(one.turns, "turn")]
        about += [_counted(one.images, "picture")] if one.images else []
        return Content.assemble((one_line(one.title, 200), "bold"), "\n  ", ("  ".join(about), MUTED))

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option.id:
            self.run_worker(partial(self._preview, int(event.option.id)), exclusive=True, group="preview")

    async def _preview(self, conversation: int) -> None:
        turns = await self._asked(partial(self._history.turns, conversation))
        lines = [f"{who}: {one_line(text)}" for turn in (turns or ())[:1] for who, text in _said(turn)]
        self.query_one("#preview", Static).update(Content("\n".join(lines)))

    async def _asked(self, call: Callable[[], _T]) -> _T | None:
        """What a call of the history returns, or None, and the reason is told, where it fails."""
        async with self._one_at_a_time:
            try:
                return await in_thread(call)
            except LocalvlmError as error:
                self.tell(told_error(error), error=True)
                return None

    # ---- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002
        """Letters are keys while the list has the focus, and text while the search has it."""
        in_list = isinstance(self.focused, OptionList)
        if action in ("rename", "delete", "export", "search"):
            return in_list and (action == "search" or bool(self._shown))
        if action == "into_list":
            return not in_list and bool(self._shown)
        return bool(self._shown) if action == "enter" else True

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def _resume(self) -> None:
        """Resumes the chosen one, or waits until what was searched is listed."""
        self._wanted = self._listed != self.query_one(Input).value
        if not self._wanted and (one := self._chosen()) is not None:
            self.dismiss(one.id)

    def action_into_list(self) -> None:
        self.set_focus(self.query_one(OptionList))  # at once: the next key goes there

    def action_search(self) -> None:
        self.set_focus(self.query_one(Input))

    def action_rename(self) -> None:
        if (one := self._chosen()) is None:
            return

        def named(title: str | None) -> None:
            if title and title != one_line(one.title):
                self._change(partial(self._history.rename, one.id, title), "")

        self.app.push_screen(EditScreen("Rename", one.title), named)

    def action_delete(self) -> None:
        if (one := self._chosen()) is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self._change(partial(self._history.delete, one.id), f"deleted: {one_line(one.title, 60)}")

        text = f"Delete \u201c{one_line(one.title, 120)}\u201d, {_counted(one.turns, 'turn')}? There is no way back."
        self.app.push_screen(ConfirmScreen(text, "Delete", "Keep", danger=True), answered)

    def action_export(self) -> None:
        if (one := self._chosen()) is not None:
            self.run_worker(self._export(one), group="change")

    async def _export(self, one: Conversation) -> None:
        path = await self._asked(partial(self._history.export, one.id, self._folder))
        if path is not None:
            self.tell(f"written: {shown_path(path)}")

    def _change(self, call: Callable[[], Any], told: str) -> None:
        async def change() -> None:
            at = self.query_one(OptionList).highlighted or 0
            self.tell("")
            await self._asked(call)
            await self._list(self.query_one(Input).value, at)
            if told and not self.query_one("#notice").has_class("-error"):
                self.tell(told)

        self.run_worker(change(), group="change")

    def _chosen(self) -> Conversation | None:
        option = self.query_one(OptionList).highlighted_option
        return None if option is None else self._shown.get(option.id or "")


def _said(turn: Turn) -> list[tuple[str, str]]:
    return [("asked", turn.question), *([("answered", turn.answer)] if turn.answer.strip() else [])]


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def _day(then: float, now: float) -> str:
    """When, as people say it: the time of today, then the day, then the year too."""
    at, today = time.localtime(then), time.localtime(now)
    days = (_ordinal(today) - _ordinal(at)) if then <= now else 0
    if days == 0:
        return time.strftime("today %H:%M", at)
    if days == 1:
        return time.strftime("yesterday %H:%M", at)
    return time.strftime("%d %b" if at.tm_year == today.tm_year else "%d %b %Y", at)


def _ordinal(at: time.struct_time) -> int:
    from datetime import date

    return date(*at[:3]).toordinal()
