"""Commands that begin with a slash: what they are called, what they take, and what they do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches

from localvlm.errors import UsageError

from .paths import is_picture

__all__ = ["COMMANDS", "Command", "begun", "parsed"]


@dataclass(frozen=True)
class Command:
    """``/name argument``; ``action``: of the app, which gets the argument. ``takes``: how the argument is called, ""
    if there is none; in brackets if it may be left out.
    """

    name: str
    action: str
    what: str
    takes: str = ""

    @property
    def usage(self) -> str:
        """As it is typed."""
        return f"/{self.name} {self.takes}".strip()


COMMANDS = (
    Command("image", "attach", "adds a picture", "PATH"),
    Command("paste", "paste_picture", "adds the picture in the clipboard"),
    Command("clear", "new_chat", "begins a new conversation"),
    Command("regen", "regenerate", "asks the last question again, for another answer"),
    Command("undo", "undo", "takes the last question back"),
    Command("copy", "copy_answer", "copies the last answer"),
    Command("model", "switch_pair", "changes the pair of guide and model", "[PAIR]"),
    Command("method", "choose_method", "changes how image tokens are chosen", "[NAME]"),
    Command("keep", "choose_keep", "changes the share of image tokens that the model sees", "R|auto|all"),
    Command("system", "choose_system", "sets the system prompt; without TEXT, takes it away", "[TEXT]"),
    Command("private", "go_private", "begins anew, and writes nothing"),
    Command("save", "save", "writes the conversation into FOLDER, as Markdown with its pictures", "[FOLDER]"),
    Command("stats", "stats", "tells what the last answer took"),
    Command("resume", "resume", "goes on with a conversation of the history"),
    Command("settings", "settings", "shows all settings"),
    Command("help", "help", "shows keys and commands"),
    Command("exit", "quit", "leaves"),
)
ALIASES = {
    "quit": "exit",
    "retry": "regen",
    "regenerate": "regen",
    "history": "resume",
    "pair": "model",
    "new": "clear",
}
_NAMED = {command.name: command for command in COMMANDS}


def begun(text: str) -> list[Command]:
    """Commands that ``text`` may become, while only their name is written."""
    if not text.startswith("/") or any(c.isspace() or c == "/" for c in text[1:]):
        return []
    return [command for command in COMMANDS if command.name.startswith(text[1:])]


def parsed(text: str) -> tuple[Command, str] | None:
    """The command and its argument; None: it is a question. A path that exists is a picture to be added,
    unless it is called as a command is: macOS has /private.

    Raises:
        UsageError: there is no such command, or no such picture, or an argument is missing or not wanted.
    """
    first, _, rest = text.strip().partition(" ")
    if not first.startswith("/") or "\n" in text.strip():
        return None
    name, argument = first[1:], rest.strip()
    command = _NAMED.get(ALIASES.get(name, name))
    if command is None and ("/" in name or (name and os.path.lexists(first))):
        if os.path.lexists(text.strip()):
            return _NAMED["image"], text.strip()
        if is_picture(first) and not rest:
            raise UsageError(f"{first!r} does not exist", "check the path")
        return None
    if command is None:
        close = get_close_matches(name, [*_NAMED, *ALIASES], 1)
        raise UsageError(
            f"there is no command '/{name}'", f"did you mean /{close[0]}?" if close else "/help lists them"
        )
    if argument and not command.takes:
        raise UsageError(f"/{name} takes nothing, and {argument!r} was given", f"write /{name} alone")
    if not argument and command.takes and not command.takes.startswith("["):
        raise UsageError(f"/{name} needs {command.takes}", f"write {command.usage}")
    return command, argument
