"""``localvlm pull``: fetches models from the hub, and says how that goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localvlm.cli.completers import pairs
from localvlm.cli.info import gigabytes
from localvlm.cli.options import ConfiguredCommand, output_options, setting, user_config
from localvlm.cli.output import Reporter
from localvlm.errors import Interrupted, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.hub import HubFile
    from localvlm.references import Reference

__all__ = ["pull"]


class _Told:
    """Progress in lines, for what is no terminal."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def begin(self, files: Sequence[HubFile]) -> None: ...

    def at(self, file: HubFile, n_bytes: int) -> None: ...

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, *exc: object) -> None: ...


class _Shown(_Told):
    """Bars on a terminal: one a file and one for all, with speed and time left."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter)
        from rich import progress as bars
        from rich.console import Console

        name = bars.TextColumn("{task.description}", markup=False)
        numbers = bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn()
        self._bars = bars.Progress(name, bars.BarColumn(None), *numbers, console=Console(stderr=True), transient=True)
        self._tasks: dict[HubFile, bars.TaskID] = {}
        self._all: bars.TaskID | None = None
        self._there: dict[HubFile, int] = {}

    def begin(self, files: Sequence[HubFile]) -> None:
        for file in files:
            self._tasks[file] = self._bars.add_task(sanitize(Path(file.name).name), total=file.size, start=False)
        if len(files) > 1:
            self._all = self._bars.add_task("all", total=sum(file.size for file in files))

    def at(self, file: HubFile, n_bytes: int) -> None:
        begins = file not in self._there  # with what was there before, which is no part of the speed
        show = partial(self._bars.reset, start=True) if begins else self._bars.update
        self._there[file] = n_bytes
        show(self._tasks[file], completed=n_bytes)
        if self._all is not None:
            show(self._all, completed=sum(self._there.values()))

    def note(self, text: str) -> None:
        self._bars.console.print(sanitize(text), markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()


@click.command(cls=ConfiguredCommand)
@click.argument("models", metavar="PAIR|REPO[:QUANT]...", nargs=-1, required=True, shell_complete=pairs)
@setting("--offline", is_flag=True, help="Ask nothing of the hub: all must be there already.")
@output_options
@click.pass_context
def pull(ctx: click.Context, models: tuple[str, ...], offline: bool, quiet: bool, verbose: int) -> None:
    """Fetches the models of a PAIR that `localvlm list` shows, or of a repository on the Hugging Face hub.

    Of a repository come the file of the quantization (Q4_K_M, else Q8_0, if none is given) and the projector that is
    nearest to it; a single file is named by its address. Files go into the cache that llama.cpp and others share, are
    gone on with where a fetch was interrupted, and are checked against the digests that the hub tells. HF_TOKEN,
    HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured. Prints the paths.
    """
    reporter = Reporter(quiet=quiet, verbose=verbose)
    from localvlm.catalog import entries

    known = {entry.name: entry for entry in entries(user_config(ctx).pairs)}
    wanted = {name: _wanted(name, known) for name in models}
    every = list(dict.fromkeys(found for roles in wanted.values() for found in roles.values()))
    try:
        paths = _there(every) if offline else _fetch(every, reporter)
    except KeyboardInterrupt:
        raise Interrupted(hint="what was fetched is kept; run the command again to go on") from None
    for name, roles in wanted.items():
        _check(name, roles, known.get(name), reporter)
    for path in paths:
        click.echo(str(path))


def _wanted(name: str, known: Mapping[str, Entry]) -> Mapping[str, Reference]:
    """What a word of the command line means on the hub, by PAIR_KEYS."""
    from localvlm.catalog import reference

    if name in known:
        if not known[name].references:
            raise UsageError(f"pair {name!r} does not come from a hub", "there is nothing to fetch")
        return known[name].references
    found = reference(name)
    if found is None:
        raise UsageError(
            f"{name!r} is neither a pair nor a repository",
            "`localvlm list` shows the pairs; else write user/repo:quant",
        )
    return {"mmproj" if "mmproj" in found.file.lower() else "model": found}


def _there(wanted: Sequence[Reference]) -> list[Path]:
    from localvlm.catalog import Pulled
    from localvlm.errors import DownloadError

    pulled = Pulled()
    paths = []
    for found in wanted:
        chosen = pulled.chosen(found)
        if not chosen:
            raise DownloadError(f"'{found}' is not on this machine", "leave --offline out to fetch it")
        paths += [file.path for file in chosen]
    return paths


def _fetch(wanted: Sequence[Reference], reporter: Reporter) -> list[Path]:
    from localvlm.hub import Hub

    with (_Shown if reporter.terminal else _Told)(reporter) as progress:
        hub = Hub(progress=progress)
        chosen = [hub.chosen(found) for found in wanted]
        for listing, files in chosen:
            size = sum(file.size for file in files)
            licence = f", licence {listing.licence}" if listing.licence else ""
            progress.note(f"{listing.repo}: {', '.join(file.name for file in files)} ({gigabytes(size)}{licence})")
        return hub.pull(chosen)


def _check(name: str, roles: Mapping[str, Reference], entry: Entry | None, reporter: Reporter) -> None:
    """Refuses what cannot work, says what is to be known of the rest, and how to go on."""
    if not roles.keys() & {"guide", "model"}:
        return
    from localvlm.catalog import located
    from localvlm.facts import facts_of, pair_notes

    for note in pair_notes(facts_of(located(dict(roles)))):
        reporter.note(f"{name}: {note}")
    if entry is not None and not entry.run:
        reporter.note(f"{name}: not run by us")
    reporter.note(f'next: localvlm ask photo.jpg "What is this?" --{"pair" if entry else "model"} {name}')
