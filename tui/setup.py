"""What the chat is started with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .conversation import Opener
from .themes import DARK

if TYPE_CHECKING:
    from pathlib import Path

    from localvlm.history import History
    from localvlm.references import Reference

__all__ = ["ChatSetup"]


@dataclass(frozen=True)
class ChatSetup:
    """What the chat is started with.

    Attributes:
        opener: makes the pipeline of a pair, in the conversation's thread.
        pair: how it is called until it is opened.
        images: names of pictures that come with the first question.
        system: prompt.
        private: nothing is written.
        history: opens the history; None: there is none.
        keymap: of the user, see :mod:`localvlm.tui.keymap`.
        theme: name of a theme.
        note: what is said before the first question.
        pairs: of the settings file, by name.
        check: raises LocalvlmError where there is no pair of a name.
        clock: seconds, that only go on; None stands still.
    """

    opener: Opener
    pair: str = ""
    images: tuple[str, ...] = ()
    system: str | None = None
    private: bool = False
    history: Callable[[], History] | None = None
    keymap: Mapping[str, str] = field(default_factory=dict)
    theme: str = DARK.name
    note: str = ""
    pairs: Mapping[str, Mapping[str, Path | Reference]] = field(default_factory=dict)
    clock: Callable[[], float] | None = time.monotonic
    check: Callable[[str], object] = str
