"""What happens in a conversation, in the order in which it happens; plain data, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localvlm.errors import LocalvlmError

if TYPE_CHECKING:
    from localvlm.answers import Answer, AskOptions, Look

__all__ = [
    "Answered",
    "Asked",
    "Died",
    "Event",
    "Failed",
    "Interrupted",
    "Looked",
    "NotSaved",
    "Opened",
    "Restarted",
    "StageBegan",
    "Text",
    "Undone",
]


@dataclass(frozen=True)
class Opened:
    """A pair can be asked. ``options``: what a question to it sets if nobody says otherwise."""

    pair: str
    options: AskOptions
    guided: bool


@dataclass(frozen=True)
class Asked:
    """A turn begins. ``note``: what is different about it, for people; "" if nothing."""

    turn: int
    note: str = ""


@dataclass(frozen=True)
class StageBegan:
    """``name``: of :data:`localvlm.answers.STAGES`. ``turn`` is 0 while no question is being answered."""

    turn: int
    name: str


@dataclass(frozen=True)
class Looked:
    """The guide has looked; what it says is a draft until ``Answered`` tells who answered."""

    turn: int
    look: Look = field(repr=False)


@dataclass(frozen=True)
class Text:
    """The next piece of an answer, as the model wrote it."""

    turn: int
    text: str


@dataclass(frozen=True)
class Answered:
    """A turn is done."""

    turn: int
    answer: Answer = field(repr=False)


@dataclass(frozen=True)
class Interrupted:
    """A turn was stopped by the user. ``partial``: what was answered so far."""

    turn: int
    partial: str


@dataclass(frozen=True)
class Failed:
    """A turn ended in an error, or something else did (``turn`` 0). ``partial``: what was answered so far."""

    turn: int
    error: LocalvlmError
    partial: str = ""


@dataclass(frozen=True)
class Died:
    """The engine's process ended by itself. Another is being started; ``turn`` is 0 if nothing was being answered."""

    turn: int
    error: LocalvlmError
    partial: str = ""


@dataclass(frozen=True)
class Restarted:
    """The engine runs again after it died, and whatever was said can be gone on with."""


@dataclass(frozen=True)
class Undone:
    """A turn was taken back."""

    turn: int


@dataclass(frozen=True)
class NotSaved:
    """A turn could not be written to the history; it is there all the same until the app is left."""

    error: LocalvlmError


Event = (
    Opened | Asked | StageBegan | Looked | Text | Answered | Interrupted | Failed | Died | Restarted | Undone | NotSaved
)
