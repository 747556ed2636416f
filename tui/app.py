"""The chat: questions and answers, what was looked at beside them, and a line below that tells why it was fast."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Event, Key
from textual.filter import LineFilter
from textual.message import Message
from textual.notifications import SeverityLevel
from textual.widgets import Static

from localvlm.errors import LocalvlmError
from localvlm.stage_names import STAGE_NAMES

from . import events
from .actions import ChatActions
from .background import in_thread
from .conversation import Conversation
from .hangup import TERMINATED, when_terminated
from .keymap import KEYS
from .palette import CommandProvider
from .recorder import HistoryRecorder
from .safe_lines import SafeLines
from .setup import ChatSetup
from .text import one_line
from .themes import THEMES, role_colours
from .told import seconds_told, tokens_told
from .widgets.chat_log import ChatLog
from .widgets.chips import Chips
from .widgets.composer import Composer
from .widgets.status_line import StatusLine
from .yielding import Typist, pause_s

if TYPE_CHECKING:
    from .widgets.message import AnswerMessage

__all__ = ["ChatApp"]

OF_THE_CHAT = frozenset(key.action for key in KEYS if key.name != "quit")
"""Actions that do nothing while a dialog is open; the app can be left at any time."""


class ChatApp(ChatActions):
    """Shows a conversation. ``run()`` returns when it is left; :meth:`close` then ends the engine."""

    TITLE = "localvlm"
    COMMANDS = {CommandProvider}
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide"), (180, "-vast")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (16, "-tall")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key.keys, key.action, key.what, id=key.name, priority=key.priority, show=False) for key in KEYS
    ]
    CSS = """
    Screen { background: $background; }
    #body { height: 1fr; }
    #chat { width: 1fr; min-width: 30; }
    #side { width: 40%; max-width: 64; display: none; border-left: solid $border-blurred; }
    .-wide #side.-shown, .-vast #side.-shown { display: block; }
    .-narrow #side.-alone { display: block; width: 1fr; max-width: 100%; border-left: none; }
    .-narrow #chat.-aside { display: none; }
    #hints { height: auto; max-height: 8; padding: 0 2; display: none; color: $text-muted; }
    #hints.-filled { display: block; }
    .-short ChatLog { padding: 0 1; }
    ToastRack { dock: top; align: right top; margin: 0; }
    """

    class Told(Message):
        """An event of the conversation."""

        def __init__(self, event: events.Event) -> None:
            super().__init__()
            self.event = event

    def __init__(self, setup: ChatSetup) -> None:
        self.setup = setup
        self._safe_lines = SafeLines()
        super().__init__()
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = setup.theme
        self.recorder = None if setup.history is None else HistoryRecorder(setup.history, setup.system)
        self.conversation = Conversation(setup.opener, self._emit, self.recorder, private=setup.private)
        if setup.system:
            self.conversation.set(system=setup.system)
        self._asked_at: dict[int, float] = {}
        self.typist = Typist()
        self._held: deque[events.Event] = deque()
        """What the conversation told, and waits to be shown."""
        self._pausing = False

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._safe_lines]

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return role_colours(self.current_theme)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of the chat are not those of a dialog over it: Textual would ask the app first."""
        if action in OF_THE_CHAT and self.screen.is_modal:
            return False
        return super().check_action(action, parameters)

    def compose(self) -> ComposeResult:
        with Horizontal(id="body"):
            with Vertical(id="chat"):
                yield ChatLog(self.setup.note, self.setup.keymap)
                yield Static(id="hints", markup=False)
                yield Composer(reading=self.setup.images)
            yield Vertical(id="side", classes="-shown")
        yield StatusLine(self.setup.pair, private=self.setup.private, keymap=self.setup.keymap)

    # life

    def on_mount(self) -> None:
        when_terminated(self._terminated)
        self.set_keymap(dict(self.setup.keymap))
        self.query_one(Composer).prompt.focus()
        self.call_after_refresh(lambda: self.run_worker(self._begin(), name="begin"))

    async def _begin(self) -> None:
        """What the first frame does not wait for: numpy, the engine, pictures."""
        panel = await in_thread(_import_panel)
        await self.query_one("#side").mount(panel())
        if not gc.isenabled():  # the command turned it off, for a first frame that comes sooner
            gc.freeze()  # what stays: modules and styles, which take tens of milliseconds to go through
            gc.enable()
        self.conversation.start()
        if self.setup.clock is not None:
            self.set_interval(0.25, self._tick)
        self.read_first()

    def close(self) -> None:
        """Ends the engine, and waits for that; after ``run()``."""
        self.conversation.close()

    def _terminated(self) -> None:
        self.conversation.cancel()
        self.exit(return_code=TERMINATED)

    def now(self) -> float:
        """Seconds, that only go on."""
        return 0.0 if self.setup.clock is None else self.setup.clock()

    async def on_event(self, event: Event) -> None:
        if isinstance(event, Key):
            self.typist.pressed(event)
            if self._held and not self.typist.types:
                self.call_later(self._show_told)
        await super().on_event(event)

    # what happens in the conversation

    def _emit(self, event: events.Event) -> None:
        """From the conversation's thread."""
        try:
            self.post_message(self.Told(event))
        except RuntimeError:  # the app has been left
            return

    @on(Told)
    async def _told(self, told: Told) -> None:
        self._held.append(told.event)
        if not self._pausing:
            await self._show_told()

    async def _show_told(self) -> None:
        """Shows all that was told; then, while somebody types, nothing for a while. Called by messages of the app,
        which are handled one by one.
        """
        started, self._pausing = time.perf_counter(), True
        while self._held:
            await self._show_event(self._held.popleft())
        self.call_after_refresh(self._pause_from, started)

    def _pause_from(self, started: float) -> None:
        if pause := pause_s(time.perf_counter() - started, self.typist):
            self.set_timer(pause, lambda: self.call_later(self._go_on))  # in turn with questions that are being shown
        else:
            self.call_later(self._go_on)

    async def _go_on(self) -> None:
        self._pausing = False
        if self._held:
            await self._show_told()

    async def _show_event(self, event: events.Event) -> None:
        turn = getattr(event, "turn", 0)
        message = self.query_one(ChatLog).answer(turn) if turn else None
        match event:
            case events.Opened():
                self.opened(event)
            case events.Asked():
                self._asked(message, event)
            case events.StageBegan():
                self._stage_began(message, event)
            case events.Looked() if message is not None:
                message.looked(event.look.answer.text)
                self.panel(lambda panel: panel.loaded(*self.conversation.loaded))
                self.panel(lambda panel: panel.looked(event.look))
            case events.Text() if message is not None:
                message.text(event.text)
            case events.Answered():
                await self._answered(message, event)
            case events.Interrupted() if message is not None:
                await message.interrupted()
                self.panel(lambda panel: panel.stopped())
                await self._ended(turn, "stopped")
            case events.Failed() | events.Died():
                await self._failed(message, event)
            case events.Restarted():
                self.notify("The engine runs again; nothing of the conversation is lost.", markup=False)
                self.status("ready")
            case events.Undone():
                await self.taken_back(turn)
                self._show_last(turn)
            case events.NotSaved():
                self.warn(event.error)

    def _asked(self, message: AnswerMessage | None, event: events.Asked) -> None:
        self._asked_at[event.turn] = self.now()
        if message is not None:
            self.turn_told = event.turn
            message.asked(event.note)
            question = next((e.question for e in self.conversation.exchanges if e.turn == event.turn), "")
            self.panel(lambda panel: panel.begin(question))

    def _stage_began(self, message: AnswerMessage | None, event: events.StageBegan) -> None:
        if message is not None:
            message.stage(event.name, self.now() - self._asked_at.get(event.turn, self.now()))
            self.panel(lambda panel: panel.stage(event.name))
        self.status("ready" if event.name == "ready" else f"{STAGE_NAMES.get(event.name, event.name)}\u2026")

    async def _answered(self, message: AnswerMessage | None, event: events.Answered) -> None:
        answer = event.answer
        if message is not None:
            await message.answered(answer)
            self.panel(lambda panel: panel.loaded(*self.conversation.loaded))
            self.panel(lambda panel: panel.answered(answer))
        parts = [f"{answer.answered_by} answered", tokens_told(answer), seconds_told(answer.ms.get("total", 0.0))]
        self.status(" \u00b7 ".join(filter(None, parts)))

    async def _failed(self, message: AnswerMessage | None, event: events.Failed | events.Died) -> None:
        error = event.error
        if message is not None:
            await message.failed(str(error))
            self.panel(lambda panel: panel.failed(error.message))
            await self._ended(event.turn, "failed")
        if isinstance(event, events.Died):
            self.notify(one_line(str(error)), title="The engine stopped", severity="error", markup=False)
            self.status("starting the engine again\u2026")
        elif message is None:
            self.warn(error, severity="error")
            self.status("not ready")

    async def _ended(self, turn: int, how: str) -> None:
        """A turn that leaves nothing the model knows of: its pictures come with the next question."""
        exchange = next((e for e in self.conversation.exchanges if e.turn == turn), None)
        if exchange is None:  # it was taken back, and that is told next
            return
        if not exchange.handed_on:
            await self.query_one(Chips).add(exchange.attached)
        self.show_pictures()
        self.status(how)

    def _show_last(self, taken: int) -> None:
        """The panel goes from the turn that was taken back to the last answer that there is; a question that waits will
        take it anyway.
        """
        exchanges = self.conversation.exchanges
        if taken != self.turn_told:
            return
        self.turn_told = exchanges[-1].turn if exchanges else 0
        if exchanges and exchanges[-1].status == "waiting":
            return
        self.status("taken back")
        self.panel(lambda panel: panel.clear())
        last = next((e for e in reversed(exchanges) if e.answer is not None), None)
        if last is not None and (answer := last.answer) is not None:
            self.panel(lambda panel: panel.begin(last.question))
            self.panel(lambda panel: panel.answered(answer))

    def _tick(self) -> None:
        for exchange in self.conversation.exchanges:
            if exchange.status == "waiting" and exchange.turn in self._asked_at:
                message = self.query_one(ChatLog).answer(exchange.turn)
                if message is not None:
                    message.tick(self.now() - self._asked_at[exchange.turn])

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = True,
    ) -> None:
        """Tells something in passing, once while it is shown."""
        if all((told.message, told.title) != (message, title) for told in self._notifications):
            super().notify(message, title=title, severity=severity, timeout=timeout, markup=markup)

    def warn(self, error: LocalvlmError, severity: str = "warning") -> None:
        """A line that goes away by itself."""
        told = "error" if severity == "error" else "warning"
        self.notify(one_line(str(error)), severity=told, markup=False, timeout=8)  # type: ignore[arg-type]

    def status(self, text: str) -> None:
        """What the line at the bottom says."""
        self.query_one(StatusLine).tell(text)


def _import_panel() -> type:
    """Loads numpy and all that needs it."""
    import localvlm.pipeline  # noqa: F401

    from .widgets.saw_panel import SawPanel

    return SawPanel
