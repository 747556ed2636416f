"""``localvlm recommend``: the pairs that this machine can hold, the largest first."""

from __future__ import annotations

import click

from localvlm.cli.info import as_json, dumps
from localvlm.cli.options import ConfiguredCommand, user_config
from localvlm.cli.output import print_table
from localvlm.room import room, told
from localvlm.sanitize import sanitize

__all__ = ["recommend"]


@click.command(cls=ConfiguredCommand)
@as_json
@click.pass_context
def recommend(ctx: click.Context, json: bool) -> None:
    """Ranks the pairs by what this machine can hold now, on the CPU: the largest that fits comes first.

    What a pair needs is told from its files where it was pulled, else about, from the sizes that the catalogue has.
    """
    from localvlm.catalog import entries
    from localvlm.ranking import ranked

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
        state = "not pulled" if one.entry.lacking else "installed"
        good = str(one.entry.about.get("good-at", one.entry.summary)) + ("" if one.entry.run else "; not run by us")
        rows.append((sanitize(one.entry.name), need, one.fits(free), state, sanitize(good)))
    print_table(rows)
    best = found[0].entry
    then = f"; next: localvlm pull {sanitize(best.name)}" if best.lacking and best.references else ""
    click.echo(f"{told(free)} of memory are free{then}", err=True)
