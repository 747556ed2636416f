"""``localvlm show`` and ``rm``: models on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.completers import any_of, files, pairs, pulled
from localvlm.cli.info import as_json, dumps, gigabytes
from localvlm.cli.options import ConfiguredCommand, output_options, setting, user_config
from localvlm.cli.output import Reporter, print_table
from localvlm.errors import Interrupted, ModelNotFound, NotGguf, StorageError, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.facts import VlmFacts
    from localvlm.hub_cache import CachedFile
    from localvlm.references import Reference

__all__ = ["rm", "show"]


@click.command(cls=ConfiguredCommand)
@click.argument("model", metavar="PAIR|REPO[:QUANT]|GGUF", shell_complete=any_of(files, pairs, pulled))
@setting("--verify", is_flag=True, help="Read all files, and compare them with the digests that they were pulled by.")
@as_json
@output_options
@click.pass_context
def show(ctx: click.Context, model: str, verify: bool, json: bool, quiet: bool, verbose: int) -> None:
    """Tells what a pair or a model is: architecture, sizes, context, image tokens, licence. Nothing is loaded."""
    reporter = Reporter(quiet=quiet, verbose=verbose)
    from localvlm.catalog import without_projector
    from localvlm.facts import facts_alone, facts_of, pair_notes

    entry = _entry(ctx, model)
    alone = without_projector(entry)
    found = {role: facts_alone(path) for role, path in alone.items()}
    if not (entry.lacking or alone):
        found = facts_of(entry.files)
    notes = [] if alone else pair_notes(found)
    if json:
        about: dict[str, Any] = {"name": entry.name, "summary": entry.summary, "run": entry.run, **entry.about}
        about["hub"] = {role: str(wanted) for role, wanted in entry.references.items()}
        about |= {"lacking": list(entry.lacking), "notes": notes}
        about |= {**{r: _facts_json(f) for r, f in found.items()}}
        click.echo(dumps(about))
    else:
        print_table([(key, sanitize(value)) for key, value in (*_entry_rows(entry, alone), *_rows(found, notes))])
    if verify:
        known = [path for vlm in found.values() for path in (vlm.model, vlm.mmproj) if path is not None]
        _verify([*entry.files.values(), *known], reporter)


def _entry(ctx: click.Context, name: str) -> Entry:
    """What the user means: a pair by name, else a model on the hub or a file, as a pair without a guide."""
    from localvlm.catalog import entries, named, reference

    pairs = user_config(ctx).pairs
    for entry in entries(pairs):
        if entry.name == name:
            return entry
    path = Path(name).expanduser()
    found = None if path.exists() else reference(name)
    if found is None and not path.exists():
        raise ModelNotFound(f"there is no pair, model or file {name!r}", "`localvlm list` shows what there is")
    return named(name, {"model": found or path})


def _entry_rows(entry: Entry, alone: Mapping[str, Path]) -> list[tuple[str, str]]:
    from localvlm.catalog import HEADROOM

    rows = [("name", entry.name)]
    if entry.summary:
        rows.append(("what", entry.summary if entry.run else f"{entry.summary}; not run by us"))
    rows += [
        (key.replace("-", " "), entry.about[key]) for key in ("good-at", "tokens", "licence") if key in entry.about
    ]
    sizes = entry.about.get("gb", {})
    for role, wanted in entry.references.items():
        size = f" ({sizes[role]:.2f} GB)" if role in sizes else ""
        rows.append((role, f"{wanted}{size}"))
    if entry.lacking and len(sizes) == 2:
        rows.append(("memory", f"about {gigabytes(sum(sizes.values()) * 1e9 + HEADROOM)}"))
    if entry.lacking or alone:
        rows += [("state", state) for state in _states(entry, alone)]
        rows.append(("next", _next(entry, alone)))
    return rows


def _states(entry: Entry, alone: Mapping[str, Path]) -> list[str]:
    """What is missing, and what of it is there."""
    from localvlm.catalog import PROJECTOR, Pulled

    states = [f"{path.name!r} is here without {PROJECTOR}, and cannot see" for path in alone.values()]
    pulled = Pulled()
    for role, wanted in entry.references.items():
        if role in alone or str(wanted) not in entry.lacking:
            continue
        there, missing = pulled.part(wanted)
        names = ", ".join(file.name for file in there)
        states.append(f"{str(wanted)!r} lacks {missing}; here: {names}" if there else f"{str(wanted)!r} is not here")
    return states + [f"'{path}' is missing" for path in entry.files.values() if not path.is_file()]


def _next(entry: Entry, alone: Mapping[str, Path]) -> str:
    if not entry.references:
        return "pass its projector: localvlm ask --model FILE --mmproj FILE" if alone else "correct the settings file"
    return f"localvlm pull {entry.name}" + ", or pass a projector with --mmproj" * bool(alone)


def _rows(found: Mapping[str, VlmFacts], notes: Sequence[str]) -> list[tuple[str, str]]:
    from localvlm.facts import PICTURES

    rows = []
    for role, vlm in found.items():
        seen = [f"{n} image tokens of {w}x{h}" for n, (w, h) in zip(vlm.tokens, PICTURES, strict=False)]
        rows += [
            ("", ""),
            (role, vlm.name),
            ("file", f"{vlm.model}"),
            ("projector", f"{vlm.mmproj or 'none'}"),
            ("size", gigabytes(vlm.n_bytes)),
            ("architecture", f"{vlm.architecture}, {vlm.n_layer} layers, {_weights(vlm)} {vlm.quant}".rstrip()),
            ("context", f"{vlm.context} positions"),
        ]
        if vlm.mmproj is not None:
            rows.append(("pictures", ", ".join([vlm.family, *seen])))
        if vlm.licence:
            rows.append(("licence", vlm.licence))
    if found and all(vlm.mmproj for vlm in found.values()):
        rows += [("", ""), ("memory", f"{_memory(found)} with a picture of 1024x768")]
    return rows + [("note", note) for note in notes]


def _memory(found: Mapping[str, VlmFacts]) -> str:
    """What all of them take at once, loaded without options."""
    from localvlm.answers import Pair, VlmFiles
    from localvlm.engine.api import LoadOptions
    from localvlm.memory import pair_need

    files = {role: VlmFiles(vlm.model, vlm.mmproj) for role, vlm in found.items() if vlm.mmproj is not None}
    return gigabytes(pair_need(Pair(None, files.get("guide"), files.get("model")), LoadOptions(), LoadOptions()).total)


def _weights(vlm: VlmFacts) -> str:
    n = vlm.n_params
    return f"{n / 1e9:.1f} B weights" if n >= 1e9 else f"{n / 1e6:.1f} M weights"


def _facts_json(vlm: VlmFacts) -> dict[str, Any]:
    from localvlm.facts import PICTURES

    told = {name: getattr(vlm, name) for name in ("name", "architecture", "quant", "n_params", "n_layer", "context")}
    tokens = {f"{w}x{h}": n for n, (w, h) in zip(vlm.tokens, PICTURES, strict=False)}
    projector = None if vlm.mmproj is None else str(vlm.mmproj)
    files = {"file": str(vlm.model), "projector": projector, "bytes": vlm.n_bytes}
    return {**told, **files, "family": vlm.family, "image_tokens": tokens, "licence": vlm.licence}


def _verify(paths: Sequence[Path], reporter: Reporter) -> None:
    """Says of each file whether it holds what was pulled, and numbers alone.

    Raises:
        NotGguf: one does not.
    """
    from localvlm.catalog import Pulled
    from localvlm.engine.gguf_header import parts_of
    from localvlm.engine.sound import unsound_tensors
    from localvlm.hub_cache import PIECE, CachedFile, digest_of

    known = {file.path: file for file in Pulled().files}
    wrong = []
    for path in dict.fromkeys(part for first in paths for part in parts_of(first)):
        file = known.get(path) or CachedFile("", "", path.name, path, path.stat().st_size, "")

        def at(n_bytes: int, of: CachedFile = file) -> None:
            if n_bytes % (1 << 26) < PIECE:
                reporter.stage(f"reading {sanitize(of.path.name)}: {n_bytes / of.size:.0%}")

        found = digest_of(file, at)
        word = "sound" if found == file.digest else "DAMAGED" if file.digest else "not pulled, nothing to compare with"
        if bad := unsound_tensors(path):
            word = f"{word}; NO NUMBERS in tensor '{bad[0]}'{f' and {len(bad) - 1} more' * (len(bad) > 1)}"
        reporter.clear()
        click.echo(f"{found}  {sanitize(str(path))}  {sanitize(word)}")
        if bad or word == "DAMAGED":
            wrong.append(file)
    if wrong:
        raise NotGguf(f"'{wrong[0].name}' is damaged", _again(wrong[0]) if wrong[0].repo else "fetch it again")


def _again(file: CachedFile) -> str:
    """How one file of the cache is fetched anew, and what lies beside it stays."""
    from localvlm.catalog import Pulled, spoken
    from localvlm.references import Reference, heads

    models = Pulled().models().items() if heads([file.name]) else ()
    alone = Reference(file.repo, file=file.name)
    name = spoken(next((wanted for wanted, files in models if file in files), alone))
    return f"`localvlm rm {name}`, then `localvlm pull {name}`"


@click.command(cls=ConfiguredCommand)
@click.argument("models", metavar="PAIR|REPO[:QUANT]...", nargs=-1, required=True, shell_complete=any_of(pairs, pulled))
@setting("-y", "--yes", is_flag=True, help="Do not ask.")
@output_options
@click.pass_context
def rm(ctx: click.Context, models: tuple[str, ...], yes: bool, quiet: bool, verbose: int) -> None:
    """Removes models from the cache that is shared with other programs, after saying what that frees.

    A REPO without a quantization means all of its GGUF files; a projector stays while another model of its repository
    needs it.
    """
    reporter = Reporter(quiet=quiet, verbose=verbose)
    from localvlm.hub_cache import removal

    files, repos = _to_remove(ctx, models, reporter)
    plan = removal(files, repos)
    for file in files:
        click.echo(f"{gigabytes(file.size):>9}  {sanitize(file.repo)}  {sanitize(file.name)}", err=True)
    for part in plan.parts:
        click.echo(f"{gigabytes(part.size):>9}  {sanitize(part.repo)}  a file that was not fetched whole", err=True)
    for part in plan.busy:
        reporter.note(f"{sanitize(part.repo)}: a file stays, as another process is fetching it")
    if not (files or plan.parts or plan.busy):
        told = ", ".join(map(repr, models))
        raise ModelNotFound(f"nothing of {told} is in the cache", "`localvlm list` shows what there is")
    if not (files or plan.parts):
        raise StorageError("nothing was removed", "wait for the process that is fetching it, or end it")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing frees {gigabytes(plan.n_bytes)} and was not agreed to", "pass --yes")
        them = "it" if len(files) + len(plan.parts) == 1 else "them"
        if not click.confirm(f"Remove {them} and free {gigabytes(plan.n_bytes)}?", err=True):
            raise Interrupted("nothing was removed")
    plan.execute()
    reporter.note(f"{gigabytes(plan.n_bytes)} freed")


def _to_remove(ctx: click.Context, names: Sequence[str], reporter: Reporter) -> tuple[list[CachedFile], set[str]]:
    """Files in the cache that words of the command line mean, and repositories.

    Raises:
        ModelNotFound: there are none of one, nor parts of its repository.
        UsageError: see :func:`_wanted`.
    """
    from localvlm.catalog import Pulled, entries
    from localvlm.hub_cache import half_fetched

    pulled = Pulled()
    known = {entry.name: entry for entry in entries(user_config(ctx).pairs, pulled)}
    files: dict[CachedFile, None] = {}
    repos = set()
    for name in names:
        wanted = _wanted(name, known)
        found = [file for one in wanted for file in pulled.removable(one)]
        if not found and not any(half_fetched(one.repo) for one in wanted):
            raise ModelNotFound(f"nothing of {name!r} is in the cache", "`localvlm list` shows what there is")
        files.update(dict.fromkeys(found))
        repos |= {one.repo for one in wanted}
        gone = {file.path for file in found}
        for entry in known.values():
            if entry.name != name and not entry.lacking and gone & set(entry.files.values()):
                reporter.note(f"pair '{entry.name}' needs some of it too")
    return list(files), repos


def _wanted(name: str, known: Mapping[str, Entry]) -> list[Reference]:
    """What a word of the command line is called on the hub.

    Raises:
        UsageError: it is a pair of the user's own files, or a path.
    """
    from localvlm.catalog import reference

    if name in known:
        if wanted := list(known[name].references.values()):
            return wanted
        raise UsageError(f"pair {name!r} was not pulled from a hub", "remove its files by other means")
    if (one := reference(name)) is None:
        raise UsageError(f"{name!r} is neither a pair nor a repository", "`localvlm list` shows what there is")
    return [one]
