"""``localvlm list``, ``methods`` and ``paths``: what there is, without loading any of it."""

from __future__ import annotations

from typing import Any

import click

from localvlm.cli.options import ConfiguredCommand, setting, user_config
from localvlm.cli.output import print_table
from localvlm.cli.sanitize import sanitize

__all__ = ["list_pairs", "methods", "paths"]

_json = setting("--json", is_flag=True, help="As JSON.")


def _dumps(value: object) -> str:
    import json

    return json.dumps(value)


@click.command("list", cls=ConfiguredCommand)
@_json
@click.pass_context
def list_pairs(ctx: click.Context, json: bool) -> None:
    """Lists the pairs that have a name."""
    from localvlm.catalog import entries

    found = entries(user_config(ctx).pairs)
    if json:
        shown: list[dict[str, Any]] = [
            {
                "name": entry.name,
                "summary": entry.summary,
                "installed": not entry.missing,
                "bytes": entry.size,
                "files": {key: str(path) for key, path in entry.files.items()},
            }
            for entry in found
        ]
        click.echo(_dumps(shown))
        return
    rows = [("NAME", "SIZE", "STATE", "WHAT IT IS")]
    for entry in found:
        state = "installed" if not entry.missing else f"{len(entry.missing)} of {len(entry.files)} files missing"
        rows.append((sanitize(entry.name), f"{entry.size / 1e6:.0f} MB", state, entry.summary))
    print_table(rows)


@click.command(cls=ConfiguredCommand)
@_json
def methods(json: bool) -> None:
    """Lists the ways to choose image tokens (--method), the rows of eval, and what each goes by besides the image.

    guide: a small VLM's attention; tower: the model's vision tower's; features: the model's projected tokens, and text:
    the question's, which take the whole image encoded; layers: the model's own rows between its layers, of which those
    below the first cut run on the whole image; weights: a file beside the model's, trained for it.
    """
    from localvlm.evaluation.plan import AT_LAYER, CONTROLS, GUIDE
    from localvlm.pruning import IN_LLM, METHODS

    needs = {
        name: ["guide"] * bool(m.aggregation)
        + sorted(m.needs)
        + ["layers"] * bool(m.within)
        + ["weights"] * bool(m.shapes)
        for name, m in METHODS.items()
    }
    summaries = {name: m.summary for name, m in METHODS.items()} | {name: m.summary for name, m in IN_LLM.items()}
    summaries |= AT_LAYER | CONTROLS
    needs |= {name: ["layers"] + ["weights"] * bool(m.trained) for name, m in IN_LLM.items()}
    needs |= {name: ["guide", "layers"] for name in AT_LAYER}
    needs |= {name: ["guide"] * (name == GUIDE.method) for name in CONTROLS}
    if json:
        click.echo(_dumps({name: {"summary": told, "needs": needs[name]} for name, told in summaries.items()}))
    else:
        print_table([(name, ", ".join(needs[name]) or "-", told) for name, told in summaries.items()])


@click.command(cls=ConfiguredCommand)
@_json
def paths(json: bool) -> None:
    """Shows where localvlm keeps its files."""
    from localvlm.catalog import models_folder
    from localvlm.config import config_file, directories

    places = directories()
    shown = {
        "settings": str(config_file()),
        "data": str(places.data),
        "cache": str(places.cache),
        "state": str(places.state),
        "bundled models": str(models_folder()),
    }
    if json:
        click.echo(_dumps(shown))
    else:
        print_table(list(shown.items()))
