"""``localvlm tokens``: what pictures cost before anything is run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import guide_image_tokens
from localvlm.cli.completers import files
from localvlm.cli.inputs import choose_pair, find_images, left_out, readable
from localvlm.cli.options import (
    ConfiguredCommand,
    image_token_options,
    input_options,
    output_options,
    pair_options,
    rank,
    setting,
    user_config,
)
from localvlm.cli.output import Reporter, print_table
from localvlm.cli.values import KeepType
from localvlm.errors import LocalvlmError, ModelError, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.engine.families import Family
    from localvlm.images import Image
    from localvlm.pipeline import Pair, VlmFiles
    from localvlm.pruning import Keep

__all__ = ["say_seen", "tokens"]


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("images", metavar="IMAGE...", nargs=-1, shell_complete=files)
@input_options
@pair_options(model=True)
@setting("--keep", type=KeepType(), metavar="R|auto|all", default="0.35", show_default=True,
         help="Share of the image tokens that the model keeps.")  # fmt: skip
@image_token_options
@setting("--json", is_flag=True, help="As JSON.")
@output_options
@click.pass_context
def tokens(ctx: click.Context, /, images: tuple[str, ...], **params: Any) -> None:
    """Tells how many image tokens the IMAGEs are to each VLM: of the pair that is named, else of every installed one;
    of others, what the catalogue says.

    Nothing is loaded: headers tell. SCALE is what is left of the picture's width and height in what a VLM sees of it
    closest up; under 1, it sees a coarser picture.
    """
    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    pairs, others = _pairs(ctx, reporter)
    sources, left = find_images(images, params), list[LocalvlmError]()

    def leave_out(name: str, error: LocalvlmError) -> None:
        if len(sources) == 1:
            raise error
        reporter.note(f"{name!r} is left out: {error}")
        left.append(error)

    found = [_counted(picture, pairs, params) for _, picture in readable(sources, reporter, leave_out)]
    if params["json"]:
        import json

        click.echo(json.dumps(found))
    elif found:
        _show(found, others)
    if left and not found:
        raise type(left[-1])(f"none of the {len(left)} pictures can be read", "what stands above says why")
    if left:
        raise left_out(left, "the others are told")


def _show(found: Sequence[dict[str, Any]], others: Sequence[Entry]) -> None:
    rows: list[tuple[str, ...]] = [("IMAGE", "PIXELS", "PAIR", "VLM", "TOKENS", "KEPT", "TILES", "SCALE")]
    for one in found:
        for vlm in one["vlms"]:
            cells = [vlm[key] for key in ("tokens", "kept", "tiles", "scale")]
            shown = ["-" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]
            place = sanitize(one["image"]), f"{one['width']}x{one['height']}", sanitize(vlm["pair"] or "-")
            rows.append((*place, f"{sanitize(vlm['name'])} ({vlm['role']})", *shown))
    print_table(rows)
    if others:
        print_table([("", ""), ("NOT HERE", "TOKENS"), *((entry.name, entry.about["tokens"]) for entry in others)])


def _pairs(ctx: click.Context, reporter: Reporter) -> tuple[list[Pair], list[Entry]]:
    """The one that options name, else all whose files are there, and those of the catalogue that are not.

    Raises:
        UsageError: there is none.
    """
    if any(rank(ctx, name) for name in ("pair", "guide", "model")):
        return [choose_pair(ctx, reporter)], []
    from localvlm.catalog import as_pair, entries

    found = entries(user_config(ctx).pairs)
    there = [as_pair(entry.name, entry.files) for entry in found if not entry.lacking]
    if not there:
        raise UsageError("no pair is installed", "`localvlm list` shows them; or pass --model")
    return there, [entry for entry in found if entry.lacking and "tokens" in entry.about]


def say_seen(pictures: Sequence[Image], pair: Pair, params: dict[str, Any], reporter: Reporter) -> None:
    """What each VLM of a pair makes of pictures, for -v."""
    with contextlib.suppress(ModelError):  # told again, better, when it is loaded
        for picture in pictures:
            for vlm in _counted(picture, [pair], {**params, "keep": None})["vlms"]:
                if vlm["tokens"] is not None:
                    counts = f"{vlm['tokens']} image tokens, tiles {vlm['tiles']}, scale {vlm['scale']:g}"
                    reporter.note(f"image {picture.name!r} to the {vlm['role']}: {counts}")


def _counted(picture: Image, pairs: list[Pair], params: dict[str, Any]) -> dict[str, Any]:
    width, height = picture.size
    vlms = []
    for pair in pairs:
        if pair.guide is not None:
            vlms.append(_seen(picture, pair, "guide", pair.guide, guide_image_tokens(params, pair), None))
        if pair.model is not None:
            vlms.append(_seen(picture, pair, "model", pair.model, params["image_max_tokens"], params["keep"]))
    return {"image": picture.name, "width": width, "height": height, "notes": list(picture.notes), "vlms": vlms}


def _seen(picture: Image, pair: Pair, role: str, files: VlmFiles, most: int, keep: Keep) -> dict[str, Any]:
    """Counts of a picture in one VLM; None where they are not known beforehand."""
    from localvlm.engine.families import Block
    from localvlm.planning.shapes import view_of
    from localvlm.pruning import share_of

    family = _family(files.mmproj, most)
    known = {"pair": pair.name, "role": role, "name": files.model.stem}
    if (view := view_of(family, *picture.size)) is None or family.cut is None:
        return {**known, "tokens": None, "kept": None, "tiles": None, "scale": None}
    blocks = [part for part in family.cut(*picture.size) if isinstance(part, Block)]
    scale = max(tile.scale(*picture.size) for block in blocks for tile in block.tiles)
    kept = None if role == "guide" or keep == "auto" else share_of(keep, view.tokens)
    return {**known, "tokens": view.tokens, "kept": kept, "tiles": len(view.tiles), "scale": round(scale, 3)}


@lru_cache(maxsize=64)
def _family(mmproj: Path, most: int) -> Family:
    from localvlm.engine.families import describe
    from localvlm.engine.plausible import read_projector

    return describe(read_projector(mmproj), most)
