"""A question and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localvlm.answers import Answer, AskOptions
    from localvlm.errors import LocalvlmError
    from localvlm.images import Image

    from .attachments import Attached

__all__ = ["Exchange"]


@dataclass(eq=False)
class Exchange:
    """A question and what came of it.

    Attributes:
        status: "waiting", "done", "interrupted" or "failed".
        text: the answer as the model wrote it, as far as it came.
        guide_text: what the guide said, None if it did not look.
        options: what it was asked with.
        kept: its number in the history, None where it is not there.
        cancelled: the user wants no more of it.
        handed_on: it failed, and its pictures come with the question behind it.
    """

    turn: int
    question: str
    attached: tuple[Attached, ...] = ()
    status: str = "waiting"
    text: str = ""
    guide_text: str | None = None
    answer: Answer | None = None
    error: LocalvlmError | None = None
    options: AskOptions | None = None
    kept: int | None = None
    cancelled: bool = field(default=False, repr=False)
    handed_on: bool = field(default=False, repr=False)

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures that came with it."""
        return tuple(each.image for each in self.attached)
