"""The help screen: keys and commands as the bindings and the list of commands have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Input, Static

from ..widgets.in_order import Line
from .dialog import Dialog

__all__ = ["HelpEntry", "HelpScreen", "HelpSection", "bound", "keyed", "typed"]


@dataclass(frozen=True)
class HelpEntry:
    """``keys``: what is pressed or typed; ``what`` it does."""

    keys: str
    what: str


@dataclass(frozen=True)
class HelpSection:
    """Entries that belong together."""

    title: str
    entries: Sequence[HelpEntry]


def bound(bindings: Iterable[BindingType], keymap: Mapping[str, str] = {}, *, hidden: bool = False) -> list[HelpEntry]:
    """What a widget's bindings say of themselves: keys that do the same are told together, in their order.

    ``keymap``: the keys that the user wants instead, by the bindings' ids. ``hidden``: those too that are not shown
    among a screen's keys.
    """
    found: dict[str, list[str]] = {}
    for given in bindings:
        binding = given if isinstance(given, Binding) else Binding(*given)
        if binding.description and (binding.show or hidden):
            keys = keymap.get(binding.id or "") or binding.key_display or binding.key
            found.setdefault(binding.description, []).extend(key.strip() for key in keys.split(","))
    return [HelpEntry(", ".join(dict.fromkeys(keys)), what) for what, keys in found.items()]


class Keyed(Protocol):
    """What is used of :class:`localvlm.tui.keymap.KeyAction`."""

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> str: ...
    @property
    def what(self) -> str: ...


class Typed(Protocol):
    """What is used of :class:`localvlm.tui.commands.Command`."""

    @property
    def usage(self) -> str: ...
    @property
    def what(self) -> str: ...


def keyed(keys: Iterable[Keyed], keymap: Mapping[str, str] = {}) -> list[HelpEntry]:
    """The keys of an app; ``keymap``: those that the user wants instead, by name."""
    return [HelpEntry(_spaced(keymap.get(key.name, key.keys)), key.what) for key in keys]


def typed(commands: Iterable[Typed]) -> list[HelpEntry]:
    """Commands as they are typed."""
    return [HelpEntry(command.usage, command.what) for command in commands]


def _spaced(keys: str) -> str:
    return ", ".join(key.strip() for key in keys.split(","))


class KeyTable(Static):
    """Sections as a table of two columns, in which long words about a key are broken within their column."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"key-table--title", "key-table--key", "key-table--what"}
    DEFAULT_CSS = """
    KeyTable {
        height: auto;
        & > .key-table--title { color: $text; text-style: bold underline; }
        & > .key-table--key { color: $text-accent; text-style: bold; }
        & > .key-table--what { color: $foreground; }
    }
    """

    def show(self, sections: Sequence[HelpSection]) -> None:
        """Shows these and no others."""
        title, key, what = (self.get_component_rich_style(f"key-table--{part}") for part in ("title", "key", "what"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=18)
        table.add_column(ratio=1)
        for number, section in enumerate(sections):
            if number:
                table.add_row()
            table.add_row(Text(section.title, title))
            for entry in section.entries:
                table.add_row(Text(entry.keys, key), Text(entry.what, what))
        self.update(table if sections else Text("no key and no command is like that", what))


class HelpScreen(Dialog[None]):
    """Keys and commands; typing keeps those that hold all words typed, arrows scroll."""

    heading = "Help"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "scroll('down')", "scroll", key_display="\u2193\u2191", priority=True),
        Binding("up", "scroll('up')", show=False, priority=True),
        Binding("pagedown", "scroll('page_down')", show=False, priority=True),
        Binding("pageup", "scroll('page_up')", show=False, priority=True),
        Binding("f1", "close", id="help", show=False),  # whatever key has opened it
    ]

    def __init__(self, sections: Sequence[HelpSection]) -> None:
        super().__init__()
        self._sections = sections

    def body(self) -> ComposeResult:
        yield Line(placeholder="search")
        with VerticalScroll(can_focus=False):
            yield KeyTable()

    def on_mount(self) -> None:
        self.query_one(KeyTable).show(self._sections)

    def on_input_changed(self, event: Input.Changed) -> None:
        words = event.value.lower().split()
        kept = [HelpSection(s.title, [e for e in s.entries if _holds(e, s, words)]) for s in self._sections]
        self.query_one(KeyTable).show([section for section in kept if section.entries])
        self.query_one(VerticalScroll).scroll_home(animate=False)

    def action_scroll(self, where: str) -> None:
        view = self.query_one(VerticalScroll)
        getattr(view, f"scroll_{where}")(animate=False)


def _holds(entry: HelpEntry, section: HelpSection, words: Sequence[str]) -> bool:
    text = f"{section.title} {entry.keys} {entry.what}".lower()
    return all(word in text for word in words)
