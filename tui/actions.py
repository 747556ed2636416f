"""What people do in the chat, by a key, a command or the palette."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual import on
from textual.app import App, SystemCommand
from textual.containers import Vertical
from textual.screen import Screen

from localvlm.errors import ImageError, LocalvlmError, StorageError, UsageError

from .attachments import Attached, from_clipboard, from_name, from_stored
from .background import in_thread
from .commands import COMMANDS, Command, begun, parsed
from .conversation import Conversation, Exchange
from .events import Opened
from .keymap import KEYS
from .recorder import HistoryRecorder, exchange_of
from .setup import ChatSetup
from .text import one_line, shown_path
from .told import seconds_told, tokens_told
from .widgets.chat_log import ChatLog
from .widgets.chips import Chips
from .widgets.composer import Composer, Prompt
from .widgets.message import AnswerMessage, ChatMessage
from .widgets.status_line import StatusLine

if TYPE_CHECKING:
    from localvlm.answers import AskOptions
    from localvlm.history import StoredTurn

    from .screens.history import HistoryScreen
    from .screens.images import Place
    from .widgets.saw_panel import SawPanel

__all__ = ["ChatActions"]


class ChatActions(App[int]):
    """The half of the app that answers to people; the other one answers to the conversation."""

    setup: ChatSetup
    conversation: Conversation
    recorder: HistoryRecorder | None
    options: AskOptions | None = None
    """What questions are asked with, once a pair is open."""
    calibrated: float | None = None
    """Score from which the guide's answer is final, if nobody says otherwise here."""
    _place: Place | None = None
    _waits: str | None = None
    """A question that waits for its pictures to be read."""

    # what the other half has

    def warn(self, error: LocalvlmError, severity: str = "warning") -> None:
        """Tells an error in passing."""
        raise NotImplementedError

    def status(self, text: str) -> None:
        """What the line at the bottom says."""
        raise NotImplementedError

    @property
    def log_view(self) -> ChatLog:
        return self.query_one(ChatLog)

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    def panel(self, tell: Callable[[SawPanel], None]) -> None:
        """Tells the side panel something, if it is there yet."""
        for panel in self.query("SawPanel"):
            tell(panel)  # type: ignore[arg-type]

    def opened(self, event: Opened) -> None:
        """A pair can be asked."""
        changes = self.conversation.changes
        self.options = replace(event.options, **changes) if changes else event.options
        self.calibrated = event.options.exit_at
        self.query_one(StatusLine).tell("ready", pair=event.pair)
        self.panel(lambda panel: panel.set_options(self.options or event.options))

    def set_options(self, **changes: Any) -> None:
        """Sets what the next question is asked with."""
        self.conversation.set(**changes)
        if self.options is not None:
            options = self.options = replace(self.options, preset=None, **changes)
            self.panel(lambda panel: panel.set_options(options))

    def show_pictures(self) -> None:
        """Tells the side panel which pictures there are: those said, and those that come with the next question."""
        said = [e for e in self.conversation.exchanges if e.status in ("done", "waiting")]
        images = [image for exchange in said for image in exchange.images]
        images += [each.image for each in self.query_one(Chips).attached]
        self.panel(lambda panel: panel.show_images(images))

    # asking

    @on(Composer.Submitted)
    async def _submitted(self, event: Composer.Submitted) -> None:
        try:
            command = parsed(event.text)
        except UsageError as error:
            self.warn(error)
            return
        if command is not None:
            self.composer.clear()
            await self.run_command(command[0].action, command[1])
        else:
            for name in self.composer.take_mentions():
                await self.attach_name(name)
            if question := self.composer.text.strip():
                await self.send(question)

    def choose_command(self, command: Command) -> None:
        """Of the palette: a command that needs something is written, to be completed."""
        if command.takes and not command.takes.startswith("["):
            self.composer.write(f"/{command.name} ")
        else:
            self.run_worker(self.run_command(command.action))

    async def run_command(self, action: str, argument: str = "") -> None:
        """Runs what a command or the palette names."""
        run: Callable[..., Any] = getattr(self, f"action_{action}")
        result = run(argument) if argument else run()
        if result is not None:
            await result

    async def send(self, question: str) -> None:
        """Asks; a question whose pictures are still being read waits for them."""
        chips, composer = self.query_one(Chips), self.composer
        if chips.reading:
            self._waits = question
            self.status("reading the picture\u2026")
            return
        attached = await chips.take()
        editing = composer.editing
        composer.clear()
        ask = self.conversation.edit if editing else self.conversation.ask
        await self._show(ask(question, attached))

    async def _show(self, exchange: Exchange) -> None:
        """A question that was asked."""
        await self.log_view.add(exchange.turn, exchange.question, exchange.images)
        self.show_pictures()

    async def action_regenerate(self) -> None:
        """Asks the last question again."""
        last = self.conversation.exchanges[-1] if self.conversation.exchanges else None
        exchange = self.conversation.regenerate()
        if last is None or exchange is None:
            self.warn(UsageError("there is no question to ask again"))
            return
        await self._untake(last)
        await self._show(exchange)

    async def _untake(self, exchange: Exchange) -> None:
        """Chips of pictures that come with an exchange again."""
        chips = self.query_one(Chips)
        for chip in list(chips.query("Chip")):
            if getattr(chip, "attached", None) in exchange.attached:
                await chips.drop(chip)  # type: ignore[arg-type]

    async def action_edit_last(self) -> None:
        """Takes the last question into the composer, to be changed and asked in place of it."""
        if not self.conversation.exchanges:
            return
        last = self.conversation.exchanges[-1]
        await self._untake(last)
        await self.query_one(Chips).add(last.attached)
        self.composer.edit(last.question)

    @on(Prompt.Emptied)
    async def _emptied(self) -> None:
        await self.action_edit_last()

    async def action_undo(self) -> None:
        """Takes the last question back; its text and pictures are there to be changed."""
        last = self.conversation.undo()
        if last is None:
            self.warn(UsageError("there is no question to take back"))
            return
        await self._untake(last)
        await self.query_one(Chips).add(last.attached)
        if not self.composer.text:
            self.composer.write(last.question)

    async def action_cancel(self) -> None:
        """Stops the answer; else leaves what is being edited; else goes to the text."""
        composer = self.composer
        if self.conversation.cancel():
            self.status("stopping\u2026")
        elif composer.editing:
            composer.clear()
            await self.query_one(Chips).clear()
        composer.prompt.focus()

    @on(Composer.Interrupt)
    async def _interrupt(self) -> None:
        if self.conversation.busy:
            await self.action_cancel()
        else:
            key = self.setup.keymap.get("quit", "ctrl+q")
            self.notify(f"{key} leaves", markup=False)

    async def action_new_chat(self) -> None:
        """Begins anew."""
        self.conversation.clear()
        await self.log_view.clear()
        await self.query_one(Chips).clear()
        self.composer.clear()
        self.composer.prompt.focus()
        self.show_pictures()
        self.status("new chat")

    async def action_go_private(self) -> None:
        """Begins anew, and writes nothing."""
        if self.conversation.private:
            self.notify("This chat is private already.", markup=False)
            return
        self.conversation.go_private()
        await self.action_new_chat()
        self.query_one(StatusLine).tell("nothing is written from now on", private=True)

    @on(ChatMessage.Taken)
    async def _taken(self, event: ChatMessage.Taken) -> None:
        last = self.conversation.exchanges[-1] if self.conversation.exchanges else None
        is_last = last is not None and last.turn == event.widget.turn
        if event.do == "copy":
            await self.copy(event.widget.raw)
        elif not is_last:
            self.notify("Only the last question can be asked again; /undo takes turns back.", markup=False)
        elif event.do == "edit":
            await self.action_edit_last()
        else:
            await self.action_regenerate()

    async def action_copy_answer(self) -> None:
        """Copies the last answer."""
        answers = list(self.query(AnswerMessage))
        if not answers or not answers[-1].raw:
            self.warn(UsageError("there is no answer to copy"))
            return
        await self.copy(answers[-1].raw)

    async def copy(self, text: str) -> None:
        """Into the clipboard: by the desktop's programs, else by the terminal."""
        from localvlm.clipboard import copy_by_program
        from localvlm.sanitize import sanitize

        safe = sanitize(text.strip())
        how = await in_thread(lambda: copy_by_program(safe))
        if how is None:
            self.copy_to_clipboard(safe)
            how = "handed to the terminal's clipboard"
        self.notify(how.capitalize() + ".", markup=False, timeout=3)

    # pictures

    async def attach_name(self, name: str) -> None:
        """Adds the pictures that a name stands for; they are read beside what goes on."""
        chip = await self.query_one(Chips).begin(name)
        self._read(chip, partial(from_name, name))

    def _read(self, chip: Any, read: Callable[[], list[Attached]]) -> None:
        self.run_worker(self._reading(chip, read), group="pictures")

    async def _reading(self, chip: Any, read: Callable[[], list[Attached]]) -> None:
        chips = self.query_one(Chips)
        try:
            attached = await in_thread(read)
        except LocalvlmError as error:
            attached = []
            self._waits = None
            self.warn(error, "error")
        await chips.replace(chip, attached)
        for note in (f"{each.image.name}: {note}" for each in attached for note in each.image.notes):
            self.notify(one_line(note), markup=False)
        if self._waits is not None and not chips.reading:
            question, self._waits = self._waits, None
            await self.send(question)

    @on(Chips.Changed)
    def _pictures_changed(self) -> None:
        self.show_pictures()

    @on(Prompt.Dropped)
    async def _dropped(self, event: Prompt.Dropped) -> None:
        for name in event.names:
            await self.attach_name(name)

    async def action_attach(self, name: str = "") -> None:
        """Adds the picture of that name."""
        await self.attach_name(name)

    async def action_paste_picture(self) -> None:
        """Adds the picture in the clipboard."""
        chip = await self.query_one(Chips).begin("(clipboard)")
        self._read(chip, from_clipboard)

    @on(Prompt.Pasting)
    async def _pasting(self) -> None:
        """A picture, if the desktop's clipboard holds one; else the text that was copied here."""
        try:
            attached = await in_thread(from_clipboard)
        except ImageError as error:
            if self.clipboard:
                self.composer.prompt.paste_text()
            else:
                self.warn(error)
            return
        await self.query_one(Chips).add(attached)

    @on(Prompt.TooLong)
    def _too_long(self) -> None:
        self.notify("The paste was cut: it is too long for a question.", severity="warning", markup=False)

    def action_open_image(self) -> None:
        """Picks pictures from folders."""
        from .screens.images import ImageBrowser, Place

        if self._place is None:
            self._place = Place(Path.cwd())
        self.push_screen(ImageBrowser(self._place), self._picked)

    async def _picked(self, paths: list[Path] | None) -> None:
        for path in paths or ():
            await self.attach_name(str(path))

    # history

    def action_resume(self) -> None:
        """Shows the history, to go on with a conversation of it."""
        if self.recorder is None:
            self.warn(UsageError("there is no history: this chat is private"))
            return
        self.run_worker(self._history(self.recorder), group="history", exclusive=True)

    async def _history(self, recorder: HistoryRecorder) -> None:
        from .screens.history import HistoryScreen

        try:
            history = await in_thread(recorder.history)
        except LocalvlmError as error:
            self.warn(error, "error")
            return
        screen: HistoryScreen = HistoryScreen(history, Path.cwd())
        self.push_screen(screen, self._resume)

    async def _resume(self, number: int | None) -> None:
        if number is not None and self.recorder is not None:
            self.run_worker(self._resuming(number, self.recorder), group="history", exclusive=True)

    async def _resuming(self, number: int, recorder: HistoryRecorder) -> None:
        self.status("reading the conversation\u2026")
        try:
            turns = await in_thread(lambda: recorder.history().turns(number))
        except LocalvlmError as error:
            self.warn(error, "error")
            return
        exchanges, lost = await in_thread(partial(_restored, turns))
        self.conversation.restore(exchanges, number)
        await self.query_one(Chips).clear()
        self.composer.clear()
        await self.log_view.clear()
        for exchange in exchanges:
            message = await self.log_view.add(exchange.turn, exchange.question, exchange.images)
            await message.restored(exchange)
        self.show_pictures()
        for each in lost:
            self.warn(each)
        self.status("the conversation goes on")
        self.composer.prompt.focus()

    async def action_save(self, folder: str = "") -> None:
        """Writes the conversation as Markdown, with its pictures."""
        recorder = self.recorder
        if recorder is None or recorder.conversation is None:
            self.warn(UsageError("there is nothing to save: nothing was said, or this chat is private"))
            return
        number, target = recorder.conversation, Path(folder).expanduser() if folder else Path.cwd()
        try:
            written = await in_thread(lambda: recorder.history().export(number, target))
        except (LocalvlmError, OSError) as error:
            told = error if isinstance(error, LocalvlmError) else StorageError(f"'{target}' cannot be written: {error}")
            self.warn(told, "error")
            return
        self.notify(f"Written as {shown_path(written)}", markup=False)

    # how it is asked

    async def action_switch_pair(self, name: str = "") -> None:
        """Changes the pair."""
        if name:
            self.status(f"opening {one_line(name, 40)}\u2026")
            self.conversation.switch(name)
            return
        from .screens.pairs import PairScreen

        current = self.query_one(StatusLine).pair
        self.push_screen(PairScreen(current=current), self._pair_chosen)

    async def _pair_chosen(self, choice: Any) -> None:
        if choice is None:
            return
        if choice.pull:
            from .screens.pull import PullScreen

            entry = choice.entry
            screen = PullScreen(entry.name, entry.references, run=entry.run)
            self.push_screen(screen, lambda result: self._pulled(entry.name, result))
        else:
            await self.action_switch_pair(choice.entry.name)

    async def _pulled(self, name: str, result: Any) -> None:
        if result is not None:
            await self.action_switch_pair(name)

    async def action_choose_method(self, name: str = "") -> None:
        """Changes how image tokens are chosen."""
        from localvlm.pruning import method_named

        if not name:
            await self.action_settings()
            return
        try:
            if name != "auto":
                method_named(name)
        except LocalvlmError as error:
            self.warn(error)
            return
        self.set_options(method=name)
        self.status(f"method {name}")

    async def action_choose_keep(self, text: str = "") -> None:
        """Changes the share of image tokens that the model sees."""
        from localvlm.cli.values import KeepType

        try:
            keep = KeepType().convert(text, None, None)
        except Exception as error:  # noqa: BLE001 - click's own, with the sentence that the command line prints
            self.warn(UsageError(getattr(error, "message", str(error)).rstrip(".")))
            return
        self.set_options(keep=keep)
        self.status(f"keep {text}")

    async def action_choose_system(self, text: str = "") -> None:
        """Sets the system prompt, or takes it away."""
        self.set_options(system=text or None)
        self.status("system prompt set" if text else "no system prompt")

    def action_stats(self) -> None:
        """Tells what the last answer took."""
        answers = [e.answer for e in self.conversation.exchanges if e.answer is not None]
        if not answers:
            self.warn(UsageError("nothing was answered yet"))
            return
        last = answers[-1]
        stages = " \u00b7 ".join(f"{name} {seconds_told(ms)}" for name, ms in last.ms.items() if ms >= 0.5)
        lines = [tokens_told(last), f"{last.tokens.prompt} cells in use, {last.tokens.generated} generated", stages]
        self.notify("\n".join(filter(None, lines)), title=f"The {last.answered_by} answered", markup=False, timeout=15)

    async def action_settings(self) -> None:
        """Shows all settings."""
        from .settings_link import show_settings

        await show_settings(self)

    # the side panel

    def on_saw_panel_retention_changed(self, event: Any) -> None:
        """Moved by its slider."""
        self.conversation.set(keep=event.keep)
        if self.options is not None:
            self.options = replace(self.options, keep=event.keep, preset=None, layer=0)

    def on_saw_panel_method_changed(self, event: Any) -> None:
        """Chosen in its list."""
        self.conversation.set(method=event.name)
        if self.options is not None:
            self.options = replace(self.options, method=event.name, preset=None, layer=0)

    def action_toggle_panel(self) -> None:
        """Shows or hides what it saw; where there is no room for both, in place of the chat."""
        side, chat = self.query_one("#side", Vertical), self.query_one("#chat", Vertical)
        if self.screen.has_class("-narrow"):
            alone = not side.has_class("-alone")
            side.set_class(alone, "-alone")
            chat.set_class(alone, "-aside")
            if not alone:
                self.composer.prompt.focus()
        else:
            side.toggle_class("-shown")

    def action_focus_prompt(self) -> None:
        """Goes to the text."""
        self.composer.prompt.focus()

    # help

    def action_help(self) -> None:
        """Shows keys and commands."""
        from .screens.help import HelpEntry, HelpScreen, HelpSection, bound, keyed, typed
        from .widgets.chips import Chip

        keymap = self.setup.keymap
        writing = [
            *bound(Prompt.BINDINGS, keymap, hidden=True)[:2],
            HelpEntry("up", "in an empty text: edits the last question"),
            HelpEntry("ctrl+v", "adds the picture in the clipboard"),
            HelpEntry("@", "picks a picture by its name"),
            HelpEntry("tab", "completes a path or a command"),
        ]
        sections = [
            HelpSection("Keys", keyed(KEYS, keymap)),
            HelpSection("Writing", writing),
            HelpSection("On a message (shift+tab)", bound(ChatMessage.BINDINGS, hidden=True)),
            HelpSection("On a picture (shift+tab)", bound(Chip.BINDINGS, hidden=True)),
            HelpSection("Commands", typed(COMMANDS)),
        ]
        self.push_screen(HelpScreen(sections))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:  # noqa: ARG002
        """What the palette has beside the commands."""
        yield SystemCommand("Pictures", "adds pictures from folders", self.action_open_image)
        yield SystemCommand("Panel", "shows or hides what it saw", self.action_toggle_panel)
        yield SystemCommand("Theme", "changes the colours", self.action_change_theme)

    @on(Prompt.Changed)
    def _typing(self, event: Prompt.Changed) -> None:
        """Commands that the text may become."""
        from textual.content import Content
        from textual.widgets import Static

        found = begun(event.text_area.text)
        hints = self.query_one("#hints", Static)
        rows = [Content.assemble((f"{c.usage:<18}", "bold $text-accent"), f" {c.what}") for c in found[:8]]
        hints.update(Content("\n").join(rows))
        hints.set_class(bool(found), "-filled")

    async def action_quit(self) -> None:
        """Leaves; what runs is stopped."""
        self.conversation.cancel()
        self.exit(0)


def _restored(turns: list[StoredTurn]) -> tuple[list[Exchange], list[LocalvlmError]]:
    """Turns as they are gone on with, and why some of their pictures could not be read."""
    exchanges, lost = [], list[LocalvlmError]()
    for turn in turns:
        attached = []
        for stored in turn.images:
            try:
                if stored.path is None:
                    raise ImageError(f"image {stored.name!r} was of no file", "the answers about it are still there")
                attached.append(from_stored(stored.path, stored.name, stored.page, stored.sha256))
            except LocalvlmError as error:
                lost.append(error)
        exchanges.append(exchange_of(turn, tuple(attached)))
    return exchanges, lost
