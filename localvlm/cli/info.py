"""``localvlm list``, ``methods`` and ``paths``: what there is, without loading any of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.options import ConfiguredCommand, setting, user_config
from localvlm.cli.output import print_table
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.hub_cache import CachedFile

__all__ = ["as_json", "dumps", "gigabytes", "list_models", "methods", "paths"]

as_json = setting("--json", is_flag=True, help="As JSON.")


def dumps(value: object) -> str:
    """One line of JSON, in ASCII."""
    import json

    return json.dumps(value)


def gigabytes(n_bytes: float) -> str:
    """A size as people read it, in powers of ten as disks are sold and hubs tell."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


@click.command("list", cls=ConfiguredCommand)
@as_json
@click.pass_context
def list_models(ctx: click.Context, json: bool) -> None:
    """Lists the pairs that have a name, and the models in the cache that is shared with other programs.

    A pair that is not there is fetched by `localvlm pull`; sizes of such are those that its catalogue tells.
    """
    from localvlm.catalog import Pulled, entries

    pulled = Pulled()
    pairs, models = entries(user_config(ctx).pairs, pulled), pulled.models()
    if json:
        shown: dict[str, Any] = {"pairs": [_pair_json(entry) for entry in pairs]}
        shown["models"] = [
            {"name": str(name), "bytes": sum(f.size for f in files), "sees": _sees(files), "files": _names(files)}
            for name, files in models.items()
        ]
        click.echo(dumps(shown))
        return
    rows = [("PAIR", "SIZE", "STATE", "WHAT IT IS")]
    for entry in pairs:
        what = entry.summary if entry.run else f"{entry.summary}; not run by us"
        rows.append((sanitize(entry.name), _size(entry), _state(entry), what))
    print_table(rows)
    if models:
        click.echo()
        whats = {True: "", False: "without a projector: cannot see"}
        named = [
            (sanitize(str(m)), gigabytes(sum(f.size for f in files)), whats[_sees(files)])
            for m, files in models.items()
        ]
        print_table([("MODEL", "SIZE", ""), *named])


def _size(entry: Entry) -> str:
    """Of what is there, else what the catalogue says."""
    if not entry.lacking:
        return gigabytes(entry.size)
    told = entry.about.get("gb", {})
    return f"{gigabytes(sum(told.values()) * 1e9)}{'' if len(told) == 2 else ' or more'}" if told else "?"


def _state(entry: Entry) -> str:
    if not entry.lacking:
        return "installed"
    return "not pulled" if entry.references else "files missing"


def _pair_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "summary": entry.summary,
        "installed": not entry.lacking,
        "run": entry.run,
        "bytes": entry.size,
        "files": {key: str(path) for key, path in entry.files.items()},
        "hub": {key: str(wanted) for key, wanted in entry.references.items()},
    }


def _sees(files: Sequence[CachedFile]) -> bool:
    return any("mmproj" in file.name.lower() for file in files)


def _names(files: Sequence[CachedFile]) -> list[str]:
    return [str(file.path) for file in files]


@click.command(cls=ConfiguredCommand)
@as_json
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
        click.echo(dumps({name: {"summary": told, "needs": needs[name]} for name, told in summaries.items()}))
    else:
        print_table([(name, ", ".join(needs[name]) or "-", told) for name, told in summaries.items()])


@click.command(cls=ConfiguredCommand)
@as_json
def paths(json: bool) -> None:
    """Shows where localvlm keeps its files."""
    from localvlm.catalog import models_folder
    from localvlm.config import config_file, directories
    from localvlm.hub_cache import cache_folder

    places = directories()
    shown = {
        "settings": str(config_file()),
        "data": str(places.data),
        "cache": str(places.cache),
        "state": str(places.state),
        "bundled models": str(models_folder()),
        "pulled models": str(cache_folder()),
    }
    if json:
        click.echo(dumps(shown))
    else:
        print_table(list(shown.items()))
