"""The image browser: folders and the pictures in them, by keyboard. It reads names, never files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from localvlm.errors import LocalvlmError

from ..background import in_thread
from ..paths import Found, filtered, listed
from ..text import shown_name, shown_path, shown_size
from .dialog import MUTED, Dialog, Rows

__all__ = ["ImageBrowser", "Place"]

MOST = 1000
"""Names that are shown of a folder; typing finds the others."""


@dataclass
class Place:
    """Where the browser is, for it to be there again the next time: the caller keeps one and passes it each time."""

    folder: Path
    hidden: bool = False


class _Names(Rows):
    """A list that hands its keys and what is typed to ``pressed``, in order, which returns False of what it leaves."""

    def __init__(self, pressed: Callable[[str, str | None], bool]) -> None:
        super().__init__()
        self._pressed = pressed

    def on_key(self, event: events.Key) -> None:
        if self._pressed(event.key, event.character if event.is_printable else None):
            event.stop()
            event.prevent_default()

    def on_paste(self, event: events.Paste) -> None:
        event.stop()
        self._pressed("", event.text.strip())


class ImageBrowser(Dialog[list[Path]]):
    """Dismissed with the pictures that were taken, in the order they were marked; ``place`` is where it was left."""

    heading = "Pictures"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "enter", "take", priority=True),
        Binding("space", "mark", "mark"),
        Binding("left", "up", "up", key_display="\u2190"),
        Binding("right", "into", show=False),
        Binding("ctrl+t", "hidden", "hidden"),
    ]
    DEFAULT_CSS = """
    ImageBrowser {
        #folder { height: 1; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; color: $foreground; }
    }
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self._found: Sequence[Found] = ()
        self._kept: Sequence[Found] = ()
        self._typed = ""
        self._marked: dict[Path, None] = {}
        self._reads = False
        """A folder is being read."""
        self._held: list[Callable[[], object]] = []
        """What was typed meanwhile: it is about that folder."""

    def body(self) -> ComposeResult:
        yield Static(id="folder", markup=False)
        yield _Names(self._on_pressed)

    def on_mount(self) -> None:
        self._go(self.place.folder)

    # ---- what is there

    def _go(self, folder: Path, back_to: str = "") -> None:
        self._reads, self._held = True, []
        self.run_worker(partial(self._list, folder, back_to), exclusive=True)

    async def _list(self, folder: Path, back_to: str) -> None:
        self.query_one(_Names).loading = not self._found
        try:
            found = await in_thread(partial(listed, folder, hidden=self.place.hidden), OSError)
        except (OSError, LocalvlmError) as error:
            why = getattr(error, "strerror", None) or error
            self.tell(f"{shown_path(folder)} cannot be read: {why}", error=True)
            self._reads = not self._found and folder != folder.parent
            if self._reads:
                await self._list(folder.parent, "")
            return
        finally:
            self.query_one(_Names).loading = False
        self.place.folder, self._found, self._typed = folder, found, ""
        self.tell("")
        self._show(back_to)
        self._reads, held, self._held = False, self._held, []
        for act in held:
            self._in_turn(act)

    def _in_turn(self, act: Callable[[], object]) -> None:
        """Does something now, or once the folder was read."""
        if self._reads:
            self._held.append(act)
        else:
            act()

    def _show(self, at: str = "") -> None:
        names = self.query_one(_Names)
        kept = filtered(self._found, self._typed)
        names.set_options([Option(self._row(one), id=str(i)) for i, one in enumerate(kept[:MOST])])
        self._kept = kept
        if kept:
            names.highlighted = next((i for i, one in enumerate(kept[:MOST]) if one.name == at), 0)
        self._head()
        if len(kept) > MOST:
            self.tell(f"{len(kept) - MOST} more: type to find them")
        elif not kept:
            self.tell(f"nothing here is called {self._typed!r}" if self._typed else "no picture and no folder is here")

    def _head(self) -> None:
        """Where this is, cut at its beginning where there is no room, and what was typed and marked."""
        head = self.query_one("#folder", Static)
        about = [(f"/{self._typed}", "bold $text-accent")] if self._typed else []
        about += [(f"{len(self._marked)} marked", "bold")] if self._marked else []
        room = max(head.content_size.width - sum(len(text) + 2 for text, _ in about), 8)
        path = shown_path(self.place.folder)
        path = path if len(path) <= room else f"\u2026{path[1 - room :]}"
        head.update(Content("  ").join([Content(path), *(Content.styled(*part) for part in about)]))

    def on_resize(self) -> None:
        self.call_after_refresh(self._head)

    def _row(self, one: Found) -> Content:
        if one.folder:
            return Content.assemble("    ", (f"{shown_name(one.name)}/", "bold"))
        mark = "[x] " if self.place.folder / one.name in self._marked else "[ ] "
        return Content.assemble(mark, shown_name(one.name), (f"  {shown_size(one.size)}", MUTED))

    # ---- keys

    def _on_pressed(self, key: str, text: str | None) -> bool:
        """Does what a key of the list is for, if it is for anything."""
        acts = {"enter": self.action_take, "space": self.action_mark, "left": self.action_up, "right": self.action_into}
        if key in acts:
            acts[key]()
        elif text or key == "backspace":
            self._in_turn(partial(self._type, text))
        else:
            return False
        return True

    def _type(self, text: str | None) -> None:
        if text is None and not self._typed:
            self.action_up()
        elif text is None:
            self._typed = self._typed[:-1]
            self._show()
        elif text == "~" and not self._typed:
            self._go(Path.home())
        elif text == "/":
            self._go(Path(self.place.folder.anchor)) if not self._typed else self.action_into()
        else:
            self._typed += text
            self.tell("")
            self._show()

    @on(OptionList.OptionSelected)
    def action_take(self) -> None:
        """Opens a folder; else takes what is marked, or the picture that is chosen."""
        self._in_turn(self._take)

    def _take(self) -> None:
        one = self._chosen()
        if one is not None and one.folder:
            self.action_into()
        elif self._marked:
            self.dismiss(list(self._marked))
        elif one is not None:
            self.dismiss([self.place.folder / one.name])

    def action_mark(self) -> None:
        self._in_turn(self._mark)

    def _mark(self) -> None:
        one = self._chosen()
        if one is None or one.folder:
            return
        path = self.place.folder / one.name
        if path in self._marked:
            del self._marked[path]
        else:
            self._marked[path] = None
        names = self.query_one(_Names)
        names.replace_option_prompt_at_index(names.highlighted or 0, self._row(one))
        names.action_cursor_down()
        self._head()

    def action_into(self) -> None:
        one = self._chosen()
        if one is not None and one.folder:
            self._go(self.place.folder / one.name)

    def action_up(self) -> None:
        folder = self.place.folder
        if folder != folder.parent:
            self._go(folder.parent, folder.name)

    def action_hidden(self) -> None:
        self.place.hidden = not self.place.hidden
        chosen = self._chosen()
        self._go(self.place.folder, chosen.name if chosen else "")

    def _chosen(self) -> Found | None:
        at = self.query_one(_Names).highlighted
        return None if at is None or at >= len(self._kept) else self._kept[at]
