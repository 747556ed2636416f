"""What people do in the chat, by a key, a command or the palette."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from textual import on
from textual.app import SystemCommand
from textual.containers import Vertical
from textual.events import DescendantFocus, Paste
from textual.screen import Screen

from localvlm.errors import LocalvlmError, UsageError

from .background import in_thread
from .commands import COMMANDS, Command, begun, parsed
from .exchange import Exchange
from .history_actions import HistoryActions
from .keymap import KEYS, key_of
from .picture_actions import PictureActions
from .text import one_line
from .told import seconds_told, tokens_told
from .widgets.chips import Chips
from .widgets.composer import Composer, Prompt, mentioned
from .widgets.status_line import StatusLine

if TYPE_CHECKING:
    from .screens.pairs import PairChoice
    from .widgets.message import ChatMessage

__all__ = ["ChatActions"]


class ChatActions(PictureActions, HistoryActions):
    """The half of the app that answers to people; the other one answers to the conversation."""

    # asking

    @on(Composer.Submitted)
    async def _submitted(self, event: Composer.Submitted) -> None:
        try:
            command = parsed(event.text)
            if command is not None:
                self._leave_edit()
                await self.run_command(command[0].action, command[1])
                return
        except LocalvlmError as error:
            self.composer.give_back(event.text)
            self.warn(error)
            return
        text, names = mentioned(event.text)
        await self.attach_names(names)
        if text.strip():
            await self.send(text.strip())

    def choose_command(self, command: Command) -> None:
        """Of the palette: a command that needs something is written, to be completed."""
        if command.takes and not command.takes.startswith("["):
            self.composer.write(f"/{command.name} ")
        else:
            self.call_later(self.run_command, command.action)

    async def run_command(self, action: str, argument: str = "") -> None:
        """Runs what a command or the palette names.

        Raises:
            LocalvlmError: ``argument`` is none that it takes.
        """
        run: Callable[..., Any] = getattr(self, f"action_{action}")
        result = run(argument) if argument else run()
        if result is not None:
            await result

    async def send(self, question: str) -> None:
        """Asks; a question whose pictures are still being read waits for them where it was written."""
        chips, composer = self.query_one(Chips), self.composer
        if self.resuming or chips.reading:
            composer.give_back(question)
            self._waits = None if self.resuming else question
            self.status("reading the conversation\u2026" if self.resuming else "reading the picture\u2026")
            return
        ask = self.conversation.edit if composer.editing else self.conversation.ask
        composer.leave_edit()
        await self._show(ask(question, chips.take()))

    async def _show(self, exchange: Exchange) -> None:
        """A question that was asked."""
        await self.log_view.add(exchange.turn, exchange.question, exchange.images)
        self.count_folded()
        self.show_pictures()

    async def action_regenerate(self) -> None:
        """Asks the last question again."""
        last = self.conversation.exchanges[-1] if self.conversation.exchanges else None
        exchange = self.conversation.regenerate()
        if last is None or exchange is None:
            self.warn(UsageError("there is no question to ask again"))
            return
        self._drop_edit()
        self.query_one(Chips).untake(last.attached)
        await self._show(exchange)

    async def action_edit_last(self) -> None:
        """Takes the last question into the composer, to be changed and asked in place of it."""
        if not self.conversation.exchanges:
            return
        last = self.conversation.exchanges[-1]
        await self.query_one(Chips).add(last.attached)
        self.composer.edit(last.question)

    def _leave_edit(self) -> None:
        """The last question stays as it is. Pictures that were added stay chips, as do those of a question that came to
        nothing.
        """
        if not self.composer.editing:
            return
        self.composer.leave_edit()
        last = self.conversation.exchanges[-1] if self.conversation.exchanges else None
        if last is not None and last.status in ("done", "waiting"):
            self.query_one(Chips).untake(last.attached)

    def _drop_edit(self) -> None:
        """The same, and what was written of it goes."""
        if self.composer.editing:
            self._leave_edit()
            self.composer.clear()

    @on(Prompt.Emptied)
    async def _emptied(self) -> None:
        await self.action_edit_last()

    async def action_undo(self) -> None:
        """Takes the last question back; its text and pictures are there to be changed."""
        self._drop_edit()
        last = self.conversation.undo()
        if last is None:
            self.warn(UsageError("there is no question to take back"))
            return
        await self.query_one(Chips).add(last.attached)
        if not self.composer.text:
            self.composer.write(last.question)

    async def action_cancel(self) -> None:
        """Leaves what is being edited; else stops the answer; else goes to the text. What was told in passing goes."""
        composer = self.composer
        self.clear_notifications()
        self.wait_no_more()
        if composer.editing:
            self._drop_edit()
        else:
            self._stop()
        composer.prompt.focus()

    def _stop(self) -> None:
        """Stops what is being answered."""
        if self.conversation.cancel():
            self.status("stopping\u2026")

    @on(Composer.Interrupt)
    async def _interrupt(self) -> None:
        if selected := self.screen.get_selected_text():  # of what is read, with the mouse
            self.copy(selected)
            self.screen.clear_selection()
        elif self.conversation.busy or self._waits is not None:
            self.wait_no_more()
            self._stop()
        else:
            self.notify(f"{key_of('quit', self.setup.keymap)} leaves", markup=False)

    async def action_new_chat(self) -> None:
        """Begins anew."""
        self.conversation.clear()
        await self.log_view.clear()
        await self.query_one(Chips).clear()
        self.composer.clear()
        self.composer.prompt.focus()
        self.show_pictures()
        self.panel(lambda panel: panel.clear())
        self.turn_told = 0
        self.status("new chat")

    async def action_go_private(self) -> None:
        """Begins anew, and writes nothing."""
        if self.conversation.private:
            self.notify("This chat is private already.", markup=False)
            return
        self.conversation.go_private()
        await self.action_new_chat()
        self.query_one(StatusLine).tell("nothing is written from now on", private=True)

    async def on_chat_message_taken(self, event: ChatMessage.Taken) -> None:
        """A key was pressed on a message."""
        last = self.conversation.exchanges[-1] if self.conversation.exchanges else None
        is_last = last is not None and last.turn == event.widget.turn
        if event.do == "copy":
            self.copy(event.widget.raw)
        elif not is_last:
            self.notify("Only the last question can be asked again; /undo takes turns back.", markup=False)
        elif event.do == "edit":
            await self.action_edit_last()
        else:
            await self.action_regenerate()

    def on_paste(self, event: Paste) -> None:
        """What is pasted where nothing takes it is for the text."""
        if not self.screen.is_modal:
            self.screen.set_focus(self.composer.prompt)  # at once: the next letter goes there
            self.composer.prompt.take_paste(event.text)

    def action_copy_answer(self) -> None:
        """Copies the last answer."""
        if answer := self.log_view.last_answer:
            self.copy(answer)
        else:
            self.warn(UsageError("there is no answer to copy"))

    def copy(self, text: str) -> None:
        """Into the clipboard: by the desktop's programs, which may take seconds, else by the terminal."""
        self.run_worker(self._copying(text), group="clipboard")

    async def _copying(self, text: str) -> None:
        from localvlm.clipboard import copy_by_program
        from localvlm.sanitize import sanitize

        safe = sanitize(text.strip())
        try:
            how = await in_thread(lambda: copy_by_program(safe))
        except LocalvlmError as error:
            self.warn(error)
            how = None
        if how is None:
            self.copy_to_clipboard(safe)
            how = "handed to the terminal's clipboard"
        self.notify(how.capitalize() + ".", markup=False, timeout=3)

    # how it is asked

    async def action_switch_pair(self, name: str = "", *, anyway: bool = False) -> None:
        """Changes the pair; ``anyway``: to one that does not fit into memory."""
        if name:
            self.setup.check(name)  # where that fails, what is open stays so
            self.status(f"opening {one_line(name, 40)}\u2026")
            self.conversation.switch(name, anyway=anyway)
            return
        from .screens.pairs import PairScreen, pairs_of

        current = self.query_one(StatusLine).pair
        self.push_screen(PairScreen(partial(pairs_of, self.setup.pairs), current), self._pair_chosen)

    async def _pair_chosen(self, choice: PairChoice | None) -> None:
        if choice is None:
            return
        if choice.pull:
            from .screens.pull import PullScreen

            entry = choice.entry
            screen = PullScreen(entry.name, entry.references, run=entry.run)
            self.push_screen(screen, lambda result: self._pulled(choice, result))
        else:
            await self._switch(choice)

    async def _pulled(self, choice: PairChoice, result: Any) -> None:
        if result is not None:
            await self._switch(choice)

    async def _switch(self, choice: PairChoice) -> None:
        try:
            await self.action_switch_pair(choice.entry.name, anyway=choice.anyway)
        except LocalvlmError as error:
            self.warn(error)

    async def action_choose_method(self, name: str = "") -> None:
        """Changes how image tokens are chosen."""
        from localvlm.pruning import method_named

        if not name:
            await self.action_settings()
            return
        if name == "auto":
            self.unset_options("method")
            self.status("method auto" if self.options is None else f"method {self.options.method}")
            return
        method_named(name)
        self.set_options(method=name)
        self.status(f"method {name}")

    async def action_choose_keep(self, text: str = "") -> None:
        """Changes the share of image tokens that the model sees."""
        from localvlm.cli.values import KeepType

        try:
            keep = KeepType().convert(text, None, None)
        except Exception as error:  # noqa: BLE001 - click's own, with the sentence that the command line prints
            raise UsageError(getattr(error, "message", str(error)).rstrip(".")) from None
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
        self.set_options(tell=False, keep=event.keep)

    def on_saw_panel_method_changed(self, event: Any) -> None:
        """Chosen in its list."""
        self.set_options(tell=False, method=event.name)

    def on_saw_panel_hidden(self) -> None:
        """By a key, or in a terminal that became smaller: what is typed goes to the text, if it went to the panel."""
        focused = self.composer.screen.focused
        if focused is None or self.query_one("#side") in focused.ancestors:
            self.composer.prompt.focus()

    def action_toggle_panel(self) -> None:
        """Shows or hides what it saw; where there is no room for both, in place of the chat."""
        side, chat = self.query_one("#side", Vertical), self.query_one("#chat", Vertical)
        if not self.screen.has_class("-narrow"):
            side.toggle_class("-shown")
        elif side.has_class("-alone"):
            self.composer.prompt.focus()
        else:
            side.add_class("-alone")
            chat.add_class("-aside")

    @on(DescendantFocus)
    def _writing(self, event: DescendantFocus) -> None:
        """Whatever leads to the text shows it, where the panel has taken its place."""
        if event.widget is self.composer.prompt:
            self.query_one("#side").remove_class("-alone")
            self.query_one("#chat").remove_class("-aside")

    def action_focus_prompt(self) -> None:
        """Goes to the text."""
        self.composer.prompt.focus()

    # help

    def action_help(self) -> None:
        """Shows keys and commands."""
        from .screens.help import HelpEntry, HelpScreen, HelpSection, bound, keyed, typed
        from .widgets.chips import Chip
        from .widgets.message import ChatMessage

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
