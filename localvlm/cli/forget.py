"""``localvlm forget``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localvlm.cli.completers import files
from localvlm.cli.options import ConfiguredCommand, output_options, setting
from localvlm.cli.output import Reporter
from localvlm.errors import ImageError, Interrupted, UsageError
from localvlm.room import told

if TYPE_CHECKING:
    from localvlm.history import ConversationSummary

__all__ = ["forget"]


@click.command(cls=ConfiguredCommand)
@click.argument("image", required=False, shell_complete=files)
@setting("--all", is_flag=True, help="All that tells of any picture or question: history too, and what eval keeps.")
@setting("-y", "--yes", is_flag=True, help="Do not ask.")
@output_options
def forget(image: str | None, all: bool, yes: bool, quiet: bool, verbose: int) -> None:  # noqa: A002
    """Removes what is kept of IMAGE, or of all pictures and questions.

    Conversations in which IMAGE was shown go as a whole; they are found by its pixels, and by its path if it is gone.
    Encoded pictures, which are kept only where --image-cache says so, cannot be told apart: they all go with any one.
    Settings, models and calibrations stay. `ask --private` leaves nothing to forget.
    """
    from localvlm.traces import forget as remove
    from localvlm.traces import traces

    if (image is None) != all:
        raise UsageError("name one IMAGE, or pass --all", "localvlm forget photo.jpg")
    reporter = Reporter(quiet=quiet, verbose=verbose)
    shown = [] if image is None else _shown(image)
    found = [trace for trace in traces(all_of_them=all) if trace.files]
    for conversation in shown:
        turns = f"{conversation.turns} turn{'s' * (conversation.turns != 1)}"
        reporter.note(f"conversation {conversation.id}: {conversation.title}, {turns}")
    for trace in found:
        reporter.note(f"{trace.name}: {trace.files} files, {told(trace.n_bytes)}, in '{trace.folder}'")
    if not found and not shown:
        reporter.note("nothing is kept")
    if ((all and found) or shown) and not yes:
        if not sys.stdin.isatty():
            raise UsageError("removing was not agreed to", "pass --yes")
        if not click.confirm("Remove them?", err=True):
            raise Interrupted("nothing was removed")
    if shown:
        from localvlm.history import History

        with History.open() as history:
            history.delete(*(conversation.id for conversation in shown))
    for trace in found:
        if not remove(trace):
            reporter.note(f"{trace.name}: emptied; the file stays while another localvlm has it open")
    if found or shown:
        reporter.note("removed")


def _shown(image: str) -> list[ConversationSummary]:
    """Conversations in which the pictures that IMAGE stands for were shown."""
    from localvlm.history import History, history_file

    if not history_file().exists():
        return []
    with History.open() as history:
        found = {c.id: c for pixels, path in _pictures(image) for c in history.with_image(pixels, path)}
    return list(found.values())


def _pictures(image: str) -> Iterator[tuple[bytes | None, Path]]:
    """Hash of the pixels and path of each, so far as it has them."""
    from localvlm.sources import Source, sources

    found: list[Source] = []
    with suppress(ImageError):
        found = sources(image)
    yield None, _path(image)
    for source in found:
        pixels = None
        with suppress(ImageError):
            pixels = source.load().content
        yield pixels, _path(source.name)


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib's raises where there is no such user
