"""Slash commands in the command palette: the same list, found by name or by what they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.fuzzy import Matcher

from .commands import ALIASES, COMMANDS, Command
from .keymap import KEYS

__all__ = ["ChoosesCommand", "CommandProvider"]

OF_KEYS = {key.action: key.what for key in KEYS}
"""What an action is said to do where its key is told."""
ALSO = {"resume": "conversations", "Theme": "colors"}
"""What some are looked for by, beside all that is said of them."""


class ChoosesCommand(Protocol):
    """What the app has for the palette."""

    def choose_command(self, command: Command) -> None:
        """Runs a command that needs no argument; writes the others for the user to complete."""


class CommandProvider(Provider):
    """Offers all commands, and then those of the app itself; for ``App.COMMANDS`` of an app that is a
    :class:`ChoosesCommand`. One provider for both: Textual shows those of several in any order.
    """

    async def discover(self) -> Hits:
        for command in COMMANDS:
            yield DiscoveryHit(command.usage.replace("[", r"\["), self._chosen(command), command.usage, command.what)
        for own in self.app.get_system_commands(self.screen):
            yield DiscoveryHit(own.title, own.callback, own.title, own.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in COMMANDS:
            names = [command.usage, *(alias for alias, name in ALIASES.items() if name == command.name)]
            what = [command.what, OF_KEYS.get(command.action, ""), ALSO.get(command.name, "")]
            if score := _score(matcher, names, *what):
                yield Hit(score, matcher.highlight(command.usage), self._chosen(command), command.usage, command.what)
        for own in self.app.get_system_commands(self.screen):
            if score := _score(matcher, [own.title], own.help, ALSO.get(own.title, "")):
                yield Hit(score, matcher.highlight(own.title), own.callback, own.title, own.help)

    def _chosen(self, command: Command) -> partial[None]:
        return partial(cast(ChoosesCommand, self.app).choose_command, command)


def _score(matcher: Matcher, names: Sequence[str], *what: str) -> float:
    """How well a query goes with what is called so and does that. Its letters may lie scattered in a name, but not in a
    sentence, which has nearly all letters: "quit" would find "asks the last question again". Of names and sentences
    together it may have the words, in any order.
    """
    query, told = matcher.query.lower(), "\n".join([*names, *what]).lower()
    weight = 3.0 if query in told else 2.0  # as a Matcher has them: letters in a row, or in few groups
    has_words = all(word in told for word in query.split())
    return max(*map(matcher.match, names), weight * len(query) if has_words else 0.0)
