"""A conversation without a screen: one thread asks, and tells in events what comes of it.

The thread owns pipeline and session, which are not thread-safe; every method here may be called by any thread and
returns at once. The engine may die at any time: it is started anew, and what was said stays.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from localvlm import errors
from localvlm.tui import events
from localvlm.tui.defects import defect
from localvlm.tui.exchange import Exchange
from localvlm.tui.pacing import Pacer

if TYPE_CHECKING:
    from localvlm.answers import Answer, AskOptions
    from localvlm.engine.api import VlmInfo
    from localvlm.pipeline import Pipeline, Session, Turn
    from localvlm.tui.attachments import Attached

__all__ = ["Conversation", "Opener", "Recorder"]

GRACE_S = 0.8
"""Seconds the engine has to stop by itself before its process is ended."""
WATCH_S = 0.25
"""How often an idle engine is looked at."""
OTHER_TEMP = 0.7
"""Temperature of an answer that is to be another one than the last."""


class Opener(Protocol):
    """Opens a pair by name, None: the one that the app was started with; ``private``: nothing may be written;
    ``anyway``: it does not fit into memory, and is wanted all the same. Called by the conversation's thread.
    """

    def __call__(self, name: str | None, private: bool, /, *, anyway: bool = False) -> tuple[Pipeline, AskOptions]: ...


class Recorder(Protocol):
    """Keeps turns; called by the conversation's thread. Methods raise StorageError."""

    def add(self, exchange: Exchange, pair: str | None) -> None: ...

    def remove(self, exchange: Exchange) -> None:
        """Takes back one that was added."""
        ...

    def go_on(self, stored: int | None) -> None:
        """What comes next belongs to the conversation of that number; None: to a new one."""
        ...

    def close(self) -> None: ...


class Conversation:
    """What is said, and the thread that asks.

    Args:
        opener: makes the pipeline.
        emit: gets every event, from the conversation's thread or a timer's.
        recorder: None keeps nothing.

    Attributes:
        exchanges: all turns that were not taken back, oldest first, failed ones among them.
        private: nothing is written.
    """

    def __init__(
        self,
        opener: Opener,
        emit: Callable[[events.Event], None],
        recorder: Recorder | None = None,
        *,
        private: bool = False,
    ) -> None:
        self._opener, self._emit, self._recorder, self.private = opener, emit, recorder, private
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="conversation", daemon=True)
        self._lock = threading.Lock()
        self._number = 0
        self._pair: str | None = None
        self._anyway = False
        self._pipeline: Pipeline | None = None
        self._session: Session | None = None
        self._options: AskOptions | None = None
        self._changes: dict[str, Any] = {}
        self._running: Exchange | None = None
        self._watched = self._closed = False
        self._done: list[Exchange] = []
        """What the session holds, or will hold once it is opened; the thread's own."""
        self.exchanges: list[Exchange] = []

    # life

    def start(self) -> None:
        """Opens the pair and loads its guide, so that the first question waits less."""
        self._thread.start()
        self._commands.put(self._warm)

    def close(self, timeout: float = 5.0) -> None:
        """Stops what is running, or loads, ends the engine, and waits for that."""
        self.cancel()
        self._closed = True
        self._commands.put(None)
        with self._lock:
            if self._pipeline is not None:
                self._pipeline.engine.cancel()
        if self._thread.ident is not None:
            self._thread.join(GRACE_S)
            if self._thread.is_alive():
                self._end()
            self._thread.join(timeout)

    # what may be asked of it, from any thread

    @property
    def busy(self) -> bool:
        """Whether a question waits for its answer."""
        return any(e.status == "waiting" for e in self.exchanges)

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of AskOptions that were set since the app was started."""
        return dict(self._changes)

    @property
    def loaded(self) -> tuple[VlmInfo | None, VlmInfo | None]:
        """The guide, if it stays beside the model, and the model, as far as they are loaded."""
        pipeline = self._pipeline
        if pipeline is None:
            return None, None
        infos = pipeline.infos
        return None if pipeline.low_memory else infos.get("guide"), infos.get("model")

    def set(self, **changes: Any) -> None:
        """Sets fields of AskOptions for the questions to come; method and budget overrule a preset or layer."""
        if changes.keys() & {"method", "keep"}:
            changes = {"preset": None, "layer": 0, **changes}
        self._changes = {**self._changes, **changes}

    def unset(self, *names: str) -> None:
        """These are again what the pair has them be, each pair its own."""
        left = {name: value for name, value in self._changes.items() if name not in names}
        if not left.keys() & {"method", "keep"}:  # nothing overrules a preset or layer any more
            left.pop("preset", None), left.pop("layer", None)
        self._changes = left

    def ask(self, question: str, attached: Sequence[Attached] = ()) -> Exchange:
        """Asks, after what was asked before; ``attached`` come with the question."""
        self._number += 1
        exchange = Exchange(self._number, question, tuple(attached))
        self.exchanges.append(exchange)
        self._commands.put(partial(self._ask, exchange, self.changes))
        return exchange

    def regenerate(self) -> Exchange | None:
        """Asks the last question again. Where the guide had answered, the model is asked this time; where the model
        had, another answer is sampled; where none came, it is the same question. None: there is no question.
        """
        last = self.exchanges[-1] if self.exchanges else None
        if last is None:
            return None
        changes = self.changes
        if last.status == "done" and last.answer is not None:
            note = "the model is asked this time"
            changes["exit_at"] = None
            if last.answer.answered_by == "model":
                seed = 0 if last.options is None else last.options.seed
                note, changes["seed"] = "another answer is sampled", seed + 1
                changes["temp"] = max(OTHER_TEMP, 0.0 if last.options is None else last.options.temp)
        else:
            note = "asked again"
        return self._again(last.question, last.attached, changes, note)

    def edit(self, question: str, attached: Sequence[Attached] = ()) -> Exchange:
        """Asks this instead of the last question."""
        if not self.exchanges:
            return self.ask(question, attached)
        return self._again(question, tuple(attached), self.changes, "")

    def _again(self, question: str, attached: tuple[Attached, ...], changes: dict[str, Any], note: str) -> Exchange:
        self.undo()
        self._number += 1
        exchange = Exchange(self._number, question, attached)
        self.exchanges.append(exchange)
        self._commands.put(partial(self._ask, exchange, changes, note))
        return exchange

    def undo(self) -> Exchange | None:
        """Takes the last turn back, stopping it if it runs; None: there is none."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        self._stop(last)
        self._commands.put(partial(self._undo, last))
        return last

    def clear(self) -> None:
        """Begins anew: nothing said, no pictures."""
        self.restore([])

    def restore(self, exchanges: Sequence[Exchange], stored: int | None = None) -> None:
        """Goes on from what was said elsewhere; exchanges get numbers of this conversation. ``stored``: its number in
        the history, None: a new one.
        """
        for exchange in self.exchanges:
            self._stop(exchange)
        for exchange in exchanges:
            self._number += 1
            exchange.turn = self._number
        self.exchanges = list(exchanges)
        self._commands.put(partial(self._restore, list(exchanges), stored))

    def switch(self, pair: str, *, anyway: bool = False) -> None:
        """Goes on with another pair; ``anyway``: though it does not fit into memory."""
        for exchange in self.exchanges:
            self._stop(exchange)
        self._commands.put(partial(self._switch, pair, anyway))

    def go_private(self) -> None:
        """Begins anew, and writes nothing from now on: no history, no cache."""
        self.private = True
        self.clear()
        self._commands.put(self._reopen)

    def cancel(self) -> bool:
        """Stops the answer that is being given, within a second; False: there is none."""
        waiting = [e for e in self.exchanges if e.status == "waiting"]
        for exchange in waiting:
            self._stop(exchange)
        return bool(waiting)

    def call(self, function: Callable[[], object]) -> None:
        """Runs ``function`` on the conversation's thread, between questions."""
        self._commands.put(function)

    # the thread

    def _run(self) -> None:
        try:
            while True:
                try:
                    command = self._commands.get(timeout=WATCH_S)
                except queue.Empty:
                    self._watch()
                    continue
                if command is None:
                    break
                try:
                    command()
                except Exception as raised:  # noqa: BLE001 - the conversation outlives what nobody thought of
                    self._emit(events.Failed(0, defect(raised)))
        finally:
            self._close_pipeline()
            if self._recorder is not None:
                self._recorder.close()

    def _open(self) -> Session:
        """The session, opened if it is not.

        Raises:
            LocalvlmError: the pair cannot be opened.
        """
        if self._pipeline is None or self._session is None:
            pipeline, self._options = self._opener(self._pair, self.private, anyway=self._anyway)
            with self._lock:
                self._pipeline = pipeline
            self._session = self._pipeline.session()
            self._session.restore(self._said())
            pair = self._pipeline.pair
            self._emit(events.Opened(pair.name or "files", self._options, pair.guide is not None))
        return self._session

    def _said(self) -> list[Turn]:
        """What was asked and answered, as a session takes it."""
        from localvlm.pipeline import Turn

        return [Turn(e.question, e.images, e.answer) for e in self._done if e.answer is not None]

    def _warm(self) -> bool:
        """Loads the VLM that looks first."""
        if self._closed:
            return False
        try:
            self._open()
            pipeline = self._pipeline
            assert pipeline is not None
            self._emit(events.StageBegan(0, "load"))
            pipeline.vlm("model" if pipeline.pair.guide is None else "guide")
            self._emit(events.StageBegan(0, "ready"))
        except errors.Interrupted:
            return False  # meant for a question that was done before it came
        except errors.LocalvlmError as error:
            self._watched = False
            self._emit(events.Failed(0, error))
            return False
        self._watched = True
        return True

    def _watch(self) -> None:
        """Tells of an engine that died while nothing was asked of it."""
        check = None if self._pipeline is None else getattr(self._pipeline.engine, "check", None)
        if check is None or not self._watched:
            return
        try:
            check()
        except errors.EngineCrashed as error:
            self._emit(events.Died(0, error))
            self._restart()

    def _restart(self) -> None:
        if self._warm():
            self._emit(events.Restarted())

    def _close_pipeline(self) -> None:
        with self._lock:
            pipeline, self._pipeline, self._session = self._pipeline, None, None
        self._watched = False
        if pipeline is not None:
            with contextlib.suppress(errors.LocalvlmError):
                pipeline.close()

    def _switch(self, pair: str, anyway: bool) -> None:
        """Closes one pair before it opens the other: there may be no room for both."""
        before = self._pair, self._anyway
        self._pair, self._anyway = pair, anyway
        self._close_pipeline()
        try:
            self._open()
        except Exception as raised:  # noqa: BLE001 - whatever it is, the pair before is gone on with
            self._pair, self._anyway = before
            self._close_pipeline()
            self._emit(events.Failed(0, defect(raised)))
        self._warm()

    def _reopen(self) -> None:
        self._close_pipeline()
        self._warm()

    def _restore(self, exchanges: Sequence[Exchange], stored: int | None) -> None:
        self._done = [e for e in exchanges if e.status == "done"]
        if self._session is not None:
            self._session.close()  # their pictures are gone
            self._session.restore(self._said())
        if self._recorder is not None:
            self._recorder.go_on(stored)

    def _undo(self, exchange: Exchange) -> None:
        if exchange in self._done:
            self._done.remove(exchange)
            if self._session is not None:
                self._session.undo()
                self._session.waiting.clear()
        if exchange.kept is not None:
            self._keep("remove", exchange)
        self._emit(events.Undone(exchange.turn))

    def _stop(self, exchange: Exchange) -> None:
        """Stops one question, whether it runs or waits."""
        with self._lock:
            if exchange.status != "waiting":
                return
            exchange.cancelled = True
            if self._running is not exchange or self._pipeline is None:
                return
            self._pipeline.engine.cancel()
        timer = threading.Timer(GRACE_S, self._end, [exchange])
        timer.daemon = True
        timer.start()

    def _end(self, exchange: Exchange | None = None) -> None:
        """Ends the engine's process, if it did not stop ``exchange`` by itself; None: whatever it does."""
        with self._lock:
            pid = None if self._pipeline is None else getattr(self._pipeline.engine, "pid", None)
            if pid is not None and exchange in (None, self._running):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    # asking

    def _ask(self, exchange: Exchange, changes: Mapping[str, Any], note: str = "") -> None:
        if exchange.cancelled:
            self._finish(exchange, errors.Interrupted())
            return
        self._emit(events.Asked(exchange.turn, note))
        pacer = Pacer(partial(self._tell, exchange))
        with self._lock:
            self._running = exchange
        answer: Answer | None = None
        error: errors.LocalvlmError | None = None
        try:
            answer = self._answer(exchange, changes, pacer.feed)
        except Exception as raised:  # noqa: BLE001 - the conversation outlives what nobody thought of
            error = defect(raised)
        finally:
            with self._lock:
                self._running = None
            pacer.flush()
        if answer is not None:
            exchange.answer, exchange.text = answer, answer.text
        self._finish(exchange, error)

    def _answer(self, exchange: Exchange, changes: Mapping[str, Any], on_text: Callable[[str], None]) -> Answer:
        session = self._open()
        with self._lock:
            if exchange.cancelled:  # from here on it is the engine that is told
                raise errors.Interrupted()
        assert self._options is not None
        exchange.options = _with_changes(self._options, changes)

        def on_look(look: Any) -> None:
            exchange.guide_text = look.answer.text.strip()
            self._emit(events.Looked(exchange.turn, look))

        while True:
            session.waiting = list(exchange.images)
            try:
                return session.ask(
                    exchange.question,
                    exchange.options,
                    on_text,
                    lambda stage: self._emit(events.StageBegan(exchange.turn, stage)),
                    on_look,
                )
            except errors.Interrupted:
                if exchange.cancelled:
                    raise
                # else it was meant for a question that was done before it came: ask again

    def _tell(self, exchange: Exchange, text: str) -> None:
        exchange.text += text
        self._emit(events.Text(exchange.turn, text))

    def _finish(self, exchange: Exchange, error: errors.LocalvlmError | None) -> None:
        """Tells how a question ended, and keeps it."""
        died = isinstance(error, errors.EngineCrashed)
        event: events.Event
        if error is None:
            assert exchange.answer is not None
            self._done.append(exchange)
            exchange.status, event = "done", events.Answered(exchange.turn, exchange.answer)
        elif exchange.cancelled:
            exchange.status, event = "interrupted", events.Interrupted(exchange.turn, exchange.text)
        else:
            kind = events.Died if died else events.Failed
            exchange.status, exchange.error = "failed", error
            self._hand_on(exchange)
            event = kind(exchange.turn, error, exchange.text)
        self._emit(event)
        self._keep("add", exchange, None if self._pipeline is None else self._pipeline.pair.name)
        if died:
            self._restart()
        else:
            self._watched = True

    def _hand_on(self, failed: Exchange) -> None:
        """The model was shown none of its pictures: a question that waits behind it is not asked blind."""
        waiting = next((e for e in self.exchanges if e.turn > failed.turn and e.status == "waiting"), None)
        if waiting is not None and failed.attached:
            waiting.attached = (*failed.attached, *waiting.attached)
            failed.handed_on = True

    def _keep(self, what: str, *args: Any) -> None:
        """Has the recorder do something; a full disk is told, and nothing of the conversation is lost."""
        if self._recorder is None or self.private:
            return
        try:
            getattr(self._recorder, what)(*args)
        except errors.LocalvlmError as error:
            self._emit(events.NotSaved(error))


def _defect(raised: Exception) -> errors.LocalvlmError:
    return errors.LocalvlmError(f"{type(raised).__name__}: {raised}", "this is a defect of localvlm: report it")


def _with_changes(options: AskOptions, changes: Mapping[str, Any]) -> AskOptions:
    """What a question sets; a method that does not follow the guide leaves early exit out unless it was set too."""
    method = changes.get("method", options.method)
    if "exit_at" not in changes and method not in ("sgl", "sgl+"):
        changes = {**changes, "exit_at": None}
    return replace(options, **changes)
