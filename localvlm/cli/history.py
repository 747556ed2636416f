"""``localvlm history``: conversations of the chat, without the chat."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localvlm.cli.completers import files
from localvlm.cli.info import as_json, dumps
from localvlm.cli.options import ConfiguredCommand, output_options, setting
from localvlm.cli.output import Reporter, print_table
from localvlm.errors import Interrupted, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from localvlm.history import ConversationSummary, History, StoredTurn

__all__ = ["history"]

_WIDEST = 60


def _what(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    from click.shell_completion import CompletionItem

    from localvlm.history import History, history_file

    if ctx.params.get("action") not in ("show", "export", "rm") or not history_file().exists():
        return []
    with History.open() as history:
        found = [(str(one.id), _title(one)) for one in history.conversations()]
    return [CompletionItem(number, help=title) for number, title in found if number.startswith(incomplete)]


@click.command(cls=ConfiguredCommand)
@click.argument("action", metavar="[list|show|export|rm]", default="list")
@click.argument("what", required=False, shell_complete=_what)
@click.argument("folder", required=False, shell_complete=files)
@as_json
@setting("-y", "--yes", is_flag=True, help="Do not ask.")
@output_options
def history(
    action: str, what: str | None, folder: str | None, json: bool, yes: bool, quiet: bool, verbose: int
) -> None:
    """Lists, shows, exports and removes conversations: `list [WORDS]`, `show ID`, `export ID [FOLDER]`, `rm ID`.

    `list` has the newest first, and those alone that hold all WORDS. `export` writes a folder with the conversation as
    Markdown and copies of its pictures, so far as they are still where they were. What `rm` removes is overwritten.
    `localvlm forget` removes all, or those in which a picture was shown.
    """
    from localvlm.history import History, history_file

    if action not in ("list", "show", "export", "rm"):
        raise UsageError(f"there is no action {action!r}", "localvlm history list|show|export|rm")
    if folder is not None and action != "export":
        raise UsageError(f"`history {action}` takes no {folder!r}", "put words to search for in quotes")
    reporter = Reporter(quiet=quiet, verbose=verbose)
    if not history_file().exists():
        _nothing(action, reporter, json=json)
        return
    with History.open() as kept:
        if action == "list":
            _list(kept, what or "", reporter, json=json)
        elif action == "show":
            _show(kept, _id(what), json=json)
        elif action == "export":
            click.echo(sanitize(str(kept.export(_id(what), Path(folder or ".").absolute()))))
        else:
            _remove(kept, _id(what), reporter, yes=yes)


def _nothing(action: str, reporter: Reporter, *, json: bool) -> None:
    """There is no history, and none is begun by looking into it."""
    if action != "list":
        raise UsageError("there are no conversations", "`localvlm chat` begins one")
    if json:
        click.echo(dumps([]))
    else:
        reporter.note("there are no conversations")


def _id(what: str | None) -> int:
    if what is None or not what.isascii() or not what.isdigit() or len(what) > 18:
        raise UsageError(f"{what or ''!r} is no ID of a conversation", "`localvlm history` lists them")
    return int(what)


def _title(one: ConversationSummary) -> str:
    title = " ".join(sanitize(one.title).split())
    return title if len(title) <= _WIDEST else f"{title[: _WIDEST - 1]}…"


def _list(kept: History, words: str, reporter: Reporter, *, json: bool) -> None:
    import dataclasses

    found = kept.conversations(words, limit=None)
    if json:
        click.echo(dumps([dataclasses.asdict(one) for one in found]))
    elif found:
        rows = [("ID", "LAST", "TURNS", "PICTURES", "TITLE")]
        for one in found:
            when = f"{datetime.fromtimestamp(one.updated):%Y-%m-%d %H:%M}"
            rows.append((str(one.id), when, str(one.turns), str(one.images), _title(one)))
        print_table(rows)
    else:
        reporter.note(f"no conversation holds {words!r}" if words else "there are no conversations")


def _show(kept: History, number: int, *, json: bool) -> None:
    if json:
        click.echo(kept.as_json(number))
        return
    for turn in kept.turns(number):
        click.echo("\n".join([*_asked(turn), "", sanitize(turn.answer).strip() or f"({turn.status})", ""]))


def _asked(turn: StoredTurn) -> list[str]:
    lines = [*(f"[{image.name}]" for image in turn.images), *sanitize(turn.question).strip().split("\n")]
    return [f"> {sanitize(line)}" for line in lines]


def _remove(kept: History, number: int, reporter: Reporter, *, yes: bool) -> None:
    one = kept.conversation(number)
    reporter.note(f"conversation {one.id}: {_title(one)}, {one.turns} turn{'s' * (one.turns != 1)}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("removing was not agreed to", "pass --yes")
        if not click.confirm("Remove it?", err=True):
            raise Interrupted("nothing was removed")
    kept.delete(number)
