"""``localvlm recommend``: the pairs that this machine can hold, the largest first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from localvlm.cli.info import as_json, dumps
from localvlm.cli.options import ConfiguredCommand, user_config
from localvlm.cli.output import print_table
from localvlm.room import room, told
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.memory import Need

__all__ = ["Ranked", "ranked", "recommend"]

ABOUT, BESIDE = 1.15, 500_000_000
"""Bytes that a pair takes of which the sizes of the files alone are known: so many times these, and so many beside. By
their headers SmolVLM2, InternVL3 and Qwen2.5-VL take 97 % of that."""


@dataclass(frozen=True)
class Ranked:
    """A pair, the bytes that it needs and with --low-memory, and whether that is told from its files' headers."""

    entry: Entry
    need: int | None
    low: int | None
    exact: bool

    def fits(self, free: int) -> str:
        if self.need is None or self.low is None:
            return "unknown"
        return "yes" if self.need <= free else "with --low-memory" if self.low <= free else "no"

    def rank(self, free: int) -> tuple[int, int]:
        order = ["yes", "with --low-memory", "unknown", "no"].index(self.fits(free))
        return order, (self.need or 0) * (1 if order == 3 else -1)


@click.command(cls=ConfiguredCommand)
@as_json
@click.pass_context
def recommend(ctx: click.Context, json: bool) -> None:
    """Ranks the pairs by what this machine can hold now, on the CPU: the largest that fits comes first.

    What a pair needs is told from its files where it was pulled, else about, from the sizes that the catalogue has.
    """
    from localvlm.catalog import entries

    free = room()
    found = ranked(entries(user_config(ctx).pairs), free)
    if json:
        shown = [
            {
                "name": one.entry.name,
                "needs": one.need,
                "needs_low_memory": one.low,
                "exact": one.exact,
                "fits": one.fits(free),
                "installed": not one.entry.lacking,
                "run": one.entry.run,
            }
            for one in found
        ]
        click.echo(dumps({"free": free, "pairs": shown}))
        return
    rows = [("NAME", "NEEDS", "FITS", "STATE", "GOOD AT")]
    for one in found:
        need = "unknown" if one.need is None else f"{'' if one.exact else 'about '}{told(one.need)}"
        state = ("not pulled" if one.entry.lacking else "installed") + ("" if one.entry.run else ", not run by us")
        good = str(one.entry.about.get("good-at", one.entry.summary))
        rows.append((sanitize(one.entry.name), need, one.fits(free), state, sanitize(good)))
    print_table(rows)
    best = found[0].entry
    then = f"; next: localvlm pull {sanitize(best.name)}" if best.lacking and best.references else ""
    click.echo(f"{told(free)} of memory are free{then}", err=True)


def ranked(found: Iterable[Entry], free: int) -> list[Ranked]:
    """Pairs by what ``free`` bytes can hold: the largest that fits comes first."""
    return sorted((_told(entry) for entry in found), key=lambda one: one.rank(free))


def _told(entry: Entry) -> Ranked:
    if (found := _of_files(entry)) is not None:
        both, apart = found
        return Ranked(entry, both.total, apart.total, exact=True)
    told_of = entry.about.get("gb", {})
    sizes = [1e9 * told_of[role] for role in ("guide", "model") if role in told_of]
    if len(sizes) < 2:
        return Ranked(entry, None, None, exact=False)
    both_files, larger = (round(ABOUT * size + BESIDE) for size in (sum(sizes), max(sizes)))
    return Ranked(entry, both_files, larger, exact=False)


def _of_files(entry: Entry) -> tuple[Need, Need] | None:
    """What a pair needs, and with --low-memory; None where its files are not there, or cannot be read."""
    from localvlm.catalog import as_pair
    from localvlm.engine.api import LoadOptions
    from localvlm.errors import ModelError
    from localvlm.memory import pair_need

    if entry.lacking or "model" not in entry.files:
        return None
    try:
        pair, plain = as_pair(entry.name, entry.files), LoadOptions()
        return pair_need(pair, plain, plain), pair_need(pair, plain, plain, low_memory=True)
    except (ModelError, OSError):
        return None
