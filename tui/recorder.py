"""Between the conversation and the history: what of a turn is kept, and how a turn that was kept is gone on with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from localvlm.errors import UsageError

from .attachments import Attached
from .exchange import Exchange
from .text import one_line

if TYPE_CHECKING:
    from localvlm.history import History, StoredTurn

__all__ = ["HistoryRecorder", "exchange_of"]

LONGEST_TITLE = 80


class HistoryRecorder:
    """Implements :class:`localvlm.tui.conversation.Recorder`; begins a conversation with its first turn.

    Args:
        opens: opens the history, when it is first needed.
        system: prompt of conversations that begin.
    """

    def __init__(self, opens: Callable[[], History], system: str | None = None) -> None:
        self._opens, self._system = opens, system
        self._history: History | None = None
        self._conversation: int | None = None
        self._lock = threading.Lock()

    @property
    def conversation(self) -> int | None:
        """The number of the conversation that turns are added to, None before its first."""
        return self._conversation

    def history(self) -> History:
        """The history; any thread may ask for it, and none may close it.

        Raises:
            StorageError: it cannot be opened.
        """
        with self._lock:
            if self._history is None:
                self._history = self._opens()
            return self._history

    def add(self, exchange: Exchange, pair: str | None) -> None:
        history, turn = self.history(), _stored(exchange, pair)
        if self._conversation is not None:
            try:
                exchange.kept = history.add(self._conversation, turn)
                return
            except UsageError:  # it was removed meanwhile, and what is said from now on is another
                self._conversation = None
        system = self._system if exchange.options is None else exchange.options.system
        self._conversation, exchange.kept = history.begin_with(turn, _title(exchange.question), pair, system)

    def remove(self, exchange: Exchange) -> None:
        if self._conversation is None or exchange.kept is None:
            return
        try:
            stays = self.history().remove(self._conversation, exchange.kept, _title)
        except UsageError:  # it is gone already
            stays = False
        if not stays:
            self._conversation = None

    def go_on(self, stored: int | None) -> None:
        self._conversation = stored

    def close(self) -> None:
        with self._lock:
            if self._history is not None:
                self._history.close()


def _title(question: str) -> str:
    return one_line(question, LONGEST_TITLE)


def _stored(exchange: Exchange, pair: str | None) -> StoredTurn:
    from localvlm.history import StoredImage, StoredTurn

    images = tuple(StoredImage.of(a.image, a.path, a.page) for a in exchange.attached)
    if exchange.answer is not None and exchange.status == "done":
        return StoredTurn.of(exchange.question, exchange.answer, images)
    options = exchange.options
    return StoredTurn(
        exchange.question,
        exchange.text,
        "model" if exchange.text else None,
        status="interrupted" if exchange.status == "interrupted" else "failed",
        guide_text=exchange.guide_text,
        images=images,
        pair=pair,
        method="" if options is None else options.method,
        keep=1.0 if options is None or options.keep is None else _told(options.keep),
    )


def _told(keep: object) -> float | str:
    return keep if isinstance(keep, float) else str(keep)


def exchange_of(turn: StoredTurn, attached: tuple[Attached, ...]) -> Exchange:
    """A turn of the history as one of a conversation, with those of its pictures that could be read."""
    from localvlm.answers import Answer, TokenCounts

    exchange = Exchange(0, turn.question, attached, status=turn.status, text=turn.answer, guide_text=turn.guide_text)
    exchange.kept = turn.id
    if turn.status == "done":
        exchange.answer = Answer(
            text=turn.answer,
            answer_ids=(),
            kept_indices=(),
            answered_by=turn.answered_by or "model",
            tokens=turn.tokens or TokenCounts(0, None, 0, 0),
            ms=dict(turn.ms),
            method=turn.method,
            keep=turn.keep,
            pair=turn.pair,
            guide_text=turn.guide_text,
            score=turn.score,
            threshold=turn.threshold,
        )
    return exchange
