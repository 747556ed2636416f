"""Keys of the app, and those that the user wants instead: ``[keys]`` of the settings file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from localvlm.errors import UsageError

__all__ = ["KEYS", "KeyAction", "checked_keymap", "key_of"]


@dataclass(frozen=True)
class KeyAction:
    """What a key does. ``name``: in the settings file; ``keys``: with commas between."""

    name: str
    keys: str
    action: str
    what: str
    priority: bool = True


KEYS = (
    KeyAction("cancel", "escape", "cancel", "leaves an edit, else stops the answer", priority=False),
    KeyAction("new-chat", "ctrl+n", "new_chat", "new chat"),
    KeyAction("open-image", "ctrl+o", "open_image", "add pictures"),
    KeyAction("resume", "ctrl+r", "resume", "history: search, resume, rename, delete, export"),
    KeyAction("regenerate", "ctrl+g", "regenerate", "ask again, for another answer"),
    KeyAction("panel", "f2", "toggle_panel", "show or hide what it saw"),
    KeyAction("pair", "f3", "switch_pair", "switch the pair"),
    KeyAction("settings", "f4", "settings", "settings"),
    KeyAction("help", "f1", "help", "help"),
    KeyAction("focus-prompt", "ctrl+l", "focus_prompt", "go to the text"),
    KeyAction("palette", "ctrl+p", "command_palette", "palette of all commands"),
    KeyAction("quit", "ctrl+q", "quit", "leave"),
)
"""Of the app; those of the text ("send", "newline") are bound there."""
OTHERS = {"send": "enter", "newline": "shift+enter, ctrl+j, alt+enter"}
_MODIFIERS = {"ctrl", "shift", "alt", "super", "hyper", "meta"}
_NAMED = re.compile(r"f([1-9]|1[0-9]|2[0-4])|[a-z0-9]|[a-z]+(_[a-z]+)*")


def key_of(name: str, keymap: Mapping[str, str] = {}, *, short: bool = False) -> str:
    """The first key of an action, as it is told; ``keymap``: those that the user wants instead. ``short``: "^P"."""
    keys = {**{key.name: key.keys for key in KEYS}, **OTHERS, **keymap}[name]
    key = keys.split(",")[0].strip()
    if re.fullmatch(r"f\d+", key):
        return key.upper()
    return f"^{key[5:].upper()}" if short and re.fullmatch(r"ctrl\+.", key) else key


def checked_keymap(keys: Mapping[str, object], place: str) -> dict[str, str]:
    """The keymap of the settings file at ``place``, by the names of KEYS.

    Raises:
        UsageError: a name is not known, or what it is bound to is no key, or is that of another action.
    """
    names = [*(key.name for key in KEYS), *OTHERS]
    found: dict[str, str] = {}
    for name, value in keys.items():
        known = name.replace("_", "-")
        if known not in names:
            close = get_close_matches(known, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            raise UsageError(f"[keys] in config file '{place}' has an unknown action {name!r}", hint)
        wanted = [value] if isinstance(value, str) else value
        if not isinstance(wanted, list) or not wanted or not all(isinstance(key, str) for key in wanted):
            raise UsageError(
                f"[keys] {name} in config file '{place}' is {value!r}", 'write a key in quotes, such as "ctrl+b"'
            )
        found[known] = ",".join(_key(key, name, place) for each in wanted for key in each.split(","))
    _check_clashes(found, place)
    return found


def _key(key: str, name: str, place: str) -> str:
    *modifiers, last = key.strip().lower().split("+")
    if not set(modifiers) <= _MODIFIERS or not _NAMED.fullmatch(last):
        raise UsageError(
            f"[keys] {name} in config file '{place}' is {key!r}, which is no key", 'write "ctrl+b", "f5" or "escape"'
        )
    if not modifiers and len(last) == 1:
        raise UsageError(
            f"[keys] {name} in config file '{place}' is {key!r}, which could not be typed any more", "add ctrl or alt"
        )
    return "+".join([*modifiers, last])


def _check_clashes(found: Mapping[str, str], place: str) -> None:
    bound = {**{key.name: key.keys for key in KEYS}, **OTHERS, **found}
    taken: dict[str, str] = {}
    for name in sorted(bound, key=lambda name: name in found):  # what the user wrote is what is told
        for key in _split(bound[name]):
            if key in taken:
                raise UsageError(
                    f"[keys] in config file '{place}' binds {key!r} to {name!r} and it is that of {taken[key]!r}",
                    "give one of them another key",
                )
            taken[key] = name


def _split(keys: str) -> Iterable[str]:
    return (key.strip() for key in keys.split(","))
