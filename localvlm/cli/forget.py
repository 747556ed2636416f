"""``localvlm forget``."""

from __future__ import annotations

import sys

import click

from localvlm.cli.options import ConfiguredCommand, files, output_options, setting
from localvlm.cli.output import Reporter
from localvlm.errors import Interrupted, UsageError
from localvlm.room import told

__all__ = ["forget"]


@click.command(cls=ConfiguredCommand)
@click.argument("image", required=False, shell_complete=files)
@setting("--all", is_flag=True, help="All that tells of any picture or question: history too, and what eval keeps.")
@setting("-y", "--yes", is_flag=True, help="Do not ask.")
@output_options
def forget(image: str | None, all: bool, yes: bool, quiet: bool, verbose: int) -> None:  # noqa: A002
    """Removes what is kept of IMAGE, or of all pictures and questions.

    Encoded pictures, which are kept only where --image-cache says so, cannot be told apart: they all go with any one.
    Settings, models and calibrations stay. `ask --private` leaves nothing to forget.
    """
    from localvlm.traces import forget as remove
    from localvlm.traces import traces

    if (image is None) != all:
        raise UsageError("name one IMAGE, or pass --all", "localvlm forget photo.jpg")
    reporter = Reporter(quiet=quiet, verbose=verbose)
    found = [trace for trace in traces(all_of_them=all) if trace.files]
    for trace in found:
        reporter.note(f"{trace.name}: {trace.files} files, {told(trace.n_bytes)}, in '{trace.folder}'")
    if not found:
        reporter.note("nothing is kept")
    if all and found and not yes:
        if not sys.stdin.isatty():
            raise UsageError("removing was not agreed to", "pass --yes")
        if not click.confirm("Remove them?", err=True):
            raise Interrupted("nothing was removed")
    for trace in found:
        remove(trace)
