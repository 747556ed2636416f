"""Entry point of the ``localvlm`` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

import localvlm
from localvlm.cli.app import App
from localvlm.cli.output import print_error
from localvlm.errors import Interrupted, LocalvlmError, NotEnoughMemory, StorageError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["cli", "main"]

_ALIASES = {"ls": "list"}
_COMMANDS = {
    "ask": ("ask", "ask", "Answers QUESTION about the IMAGEs."),
    "attention": ("attention", "attention", "Saves what the guide attends to when it answers QUESTION about IMAGE."),
    "bench": ("bench", "bench", "Measures how much sooner answers come than from llama.cpp."),
    "calibrate": ("calibrate", "calibrate", "Finds from which score on the guide's answer is final."),
    "chat": ("chat", "chat", "Opens a chat about the IMAGEs in the terminal."),
    "completion": ("completion", "completion", "Prints what completes commands, options, models and files in SHELL."),
    "config": ("config", "config", "Reads and writes the settings file."),
    "doctor": ("doctor", "doctor", "Looks at this installation, and tells what mends what is wrong."),
    "eval": ("evaluate", "evaluate", "Tells what methods and budgets cost and lose on the questions of DATA."),
    "forget": ("forget", "forget", "Removes what is kept of IMAGE, or of all pictures and questions."),
    "history": ("history", "history", "Lists, shows, exports and removes conversations."),
    "list": ("info", "list_models", "Lists pairs, and models that were pulled."),
    "methods": ("info", "methods", "Lists the ways to choose image tokens, and controls."),
    "tokens": ("tokens", "tokens", "Tells how many image tokens the IMAGEs are to each VLM."),
    "paths": ("info", "paths", "Shows where localvlm keeps its files."),
    "pull": ("pull", "pull", "Fetches models from the Hugging Face hub."),
    "recommend": ("recommend", "recommend", "Ranks the pairs by what this machine can hold."),
    "rm": ("models", "rm", "Removes models that were pulled."),
    "show": ("models", "show", "Tells what a pair or a model is, and whether its files are sound."),
}
"""Module and name of each command, and what the list of commands says of it, so that none is loaded before it runs."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = _COMMANDS.get(_ALIASES.get(name, name))
        if found is None:
            return super().get_command(ctx, name)
        command: click.Command = getattr(import_module(f"localvlm.cli.{found[0]}"), found[1])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = [] if args[0].startswith("-") else get_close_matches(args[0], [*_COMMANDS, *_ALIASES], 1)
            if near:
                raise UsageError(f"no such command {args[0]!r}", f"did you mean {near[0]!r}?") from error
            raise

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=told) for name, (_, _, told) in _COMMANDS.items()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [item for item in found if item.value.startswith(incomplete)] + options

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, _, told) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read us has read enough
            _swallow_stdout()
            ctx.exit(0)
        except KeyboardInterrupt:
            raise Interrupted() from None
        return result


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(localvlm.__version__, prog_name="localvlm", message="%(prog)s %(version)s")
def cli() -> None:
    """Ask questions about images, offline.

    A small VLM looks first; its attention decides which image tokens a larger one sees.

    Try: localvlm ask example "What colour is the star?"
    """


def main(args: Sequence[str] | None = None, app: App | None = None) -> None:
    """Runs the command line and exits: one sentence for every error, never a traceback.

    ``LOCALVLM_DEBUG=1`` shows tracebacks.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # numpy's OpenBLAS, loaded later on, would keep its threads spinning for 2**26 ticks after each product, on the
    # cores that llama.cpp's threads need next.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    _prepare_streams()
    if "_LOCALVLM_COMPLETE" in os.environ:
        import_module("localvlm.cli.completion")
    try:
        code = cli.main(args, prog_name="localvlm", standalone_mode=False, obj=app or App())
    except BaseException as error:
        if os.environ.get("LOCALVLM_DEBUG") and not isinstance(error, SystemExit | click.exceptions.Exit):
            raise
        code = _report(error)
        try:
            sys.stdout.flush()
        except OSError:  # what cannot be written would fail once more when Python ends
            _swallow_stdout()
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)


def _swallow_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _prepare_streams() -> None:
    """Closed streams swallow what is written; characters that a stream's encoding lacks become "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _report(error: BaseException) -> int:
    """Prints an error and gives its exit code."""
    if isinstance(error, SystemExit | click.exceptions.Exit):
        code = error.code if isinstance(error, SystemExit) else error.exit_code
        return code if isinstance(code, int) else 1
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    known = _as_known(error)
    print_error(known)
    return known.exit_code


def _as_known(error: BaseException) -> LocalvlmError:
    if isinstance(error, LocalvlmError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Interrupted()
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "localvlm"
        return UsageError(_sentence(error.format_message()), f"`{command} --help` tells more")
    if isinstance(error, click.ClickException):
        return UsageError(_sentence(error.format_message()))
    if isinstance(error, MemoryError):
        return NotEnoughMemory("out of memory", "close other programs, or use smaller images or models")
    if isinstance(error, OSError):
        if not error.filename and _stdout_fails():
            return StorageError(f"standard output cannot be written: {error.strerror or error}", "write it elsewhere")
        return StorageError(f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}")
    return LocalvlmError(f"internal error: {type(error).__name__}: {error}", "LOCALVLM_DEBUG=1 shows the traceback")


def _stdout_fails() -> bool:
    """What could not be written is still in its buffer, and fails again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def _sentence(text: str) -> str:
    """Click's message in our form: one line, no full stop, no capital."""
    text = " ".join(text.split()).removesuffix(".")
    return text[:1].lower() + text[1:]
