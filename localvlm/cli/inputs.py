"""What a command is given: pictures, text on standard input, the pair of VLMs."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from localvlm.cli.app import guide_image_tokens
from localvlm.cli.options import on_command_line, rank, user_config
from localvlm.cli.output import Reporter
from localvlm.errors import DownloadError, ImageError, LocalvlmError, ModelNotFound, UsageError

if TYPE_CHECKING:
    from localvlm.images import Image
    from localvlm.pipeline import Pair
    from localvlm.references import Reference
    from localvlm.sources import Source

__all__ = ["EXAMPLE", "check_images", "choose_pair", "exit_threshold", "find_images", "full_question", "left_out",
           "load_images", "readable"]  # fmt: skip

EXAMPLE = "example"
"""Names the bundled picture, unless there is a file of that name."""
STDIN_WAIT_S = 1.0
"""How long to wait for the first byte of a pipe: an inherited pipe that nobody writes must not hang us."""
MAX_STDIN_TEXT = 1 << 20


def find_images(names: Sequence[str], params: Mapping[str, Any] = {}) -> list[Source]:
    """What the IMAGEs of a command stand for, and after them what its options --clip and --screen (``params``) say;
    nothing is read yet.

    Raises:
        UsageError: there is none.
        ImageError: see :func:`localvlm.sources.sources`.
    """
    if names.count("-") > 1:
        raise UsageError("`-` was given twice and there is one standard input", "give files")
    from localvlm.sources import Source, is_url, sources

    found: list[Source] = []
    for name in names:
        if name == EXAMPLE and not os.path.lexists(name):
            found.append(Source(name, _example))
        elif is_url(name) and params.get("fetch"):
            found.append(Source(name, partial(_fetched, name)))
        else:
            found += sources(name)
    if params.get("clip"):
        found.append(Source("(clipboard)", _from_clipboard))
    if params.get("screen"):
        from localvlm.clipboard import picture_of_screen

        found.append(Source("(screen)", picture_of_screen))
    if not found:
        raise UsageError("no image was given", "localvlm ask IMAGE QUESTION")
    return found


def _example() -> Image:
    from localvlm.catalog import example_image
    from localvlm.images import load

    return load(example_image(), EXAMPLE)


def _fetched(url: str) -> Image:
    from localvlm.fetch import fetch
    from localvlm.images import load

    return load(fetch(url), url, apart=True)


def _from_clipboard() -> Image:
    from localvlm.clipboard import picture_of_clipboard
    from localvlm.images import load
    from localvlm.sources import sources

    found = picture_of_clipboard()
    return load(found, "(clipboard)") if isinstance(found, bytes) else sources(found)[0].load()


def load_images(names: Sequence[str], reporter: Reporter, params: Mapping[str, Any] = {}) -> list[Image]:
    """Decodes the pictures that :func:`find_images` finds, and says what was done to them.

    Raises:
        UsageError: there is none.
        ImageError: one cannot be read.
    """
    found = find_images(names, params)
    try:
        return [_load_image(source, reporter) for source in found]
    except ImageError as error:
        wordlike = [name for name in names if not os.path.lexists(name) and not Path(name).suffix]
        if len(names) > 1 and any(repr(name) in error.message for name in wordlike):
            raise ImageError(error.message, "if it belongs to the question, put the question in quotes") from error
        raise


def _load_image(source: Source, reporter: Reporter) -> Image:
    """Decodes a picture, and says what was done to it.

    Raises:
        ImageError: it cannot be read.
    """
    image = source.load()
    for note in image.notes:
        reporter.note(f"image {image.name!r}: {note}")
    if reporter.verbose:
        reporter.note(f"image {image.name!r}: {image.size[0]}x{image.size[1]} pixels")
    return image


def readable(
    found: Iterable[Source], reporter: Reporter, failed: Callable[[str, LocalvlmError], None]
) -> Iterator[tuple[str, Image]]:
    """Names of pictures, and those that can be read, one by one; ``failed`` hears of the others."""
    for source in found:
        try:
            yield source.name, _load_image(source, reporter)
        except (ImageError, DownloadError) as error:
            failed(source.name, error)


def left_out(failed: Sequence[LocalvlmError], hint: str) -> LocalvlmError:
    """What ends a command that could not answer for some pictures; of the kind of the last failure."""
    n = len(failed)
    return type(failed[-1])(f"{n} picture{'s were' if n > 1 else ' was'} left out", hint)


def check_images(names: Iterable[str], reporter: Reporter) -> None:
    """Decodes files once each, before hours of questions about them: one that is damaged is told now, not then.

    Raises:
        ImageError: one cannot be read.
    """
    from localvlm.images import load

    files = [name for name in dict.fromkeys(names) if name != "-"]  # which can be read but once
    progress = reporter.progress(0, len(files), "pictures checked")
    try:
        for done, name in enumerate(files):
            progress(done)
            load(name)
    finally:
        reporter.clear()


def full_question(question: str, images: Sequence[str], reporter: Reporter) -> str:
    """The question, after the text on standard input if there is any."""
    question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    before = "" if "-" in images else _stdin_text(reporter)
    text = f"{before.rstrip()}\n\n{question}" if before.strip() else question
    if not text.strip():
        raise UsageError("the question is empty", 'localvlm ask IMAGE "What is this?"')
    return text


def _stdin_text(reporter: Reporter) -> str:
    stdin: TextIO | None = sys.stdin
    if stdin is None or stdin.closed:
        return ""
    try:
        descriptor = stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError):  # replaced by an object in memory
        return stdin.read(MAX_STDIN_TEXT)
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if not select.select([descriptor], [], [], STDIN_WAIT_S)[0]:
            reporter.note("nothing came on standard input within a second; going on without it (`</dev/null` says so)")
            return ""
    elif not stat.S_ISREG(mode):  # a terminal, /dev/null and other devices
        return ""
    data = stdin.buffer.read(MAX_STDIN_TEXT + 1)
    if len(data) > MAX_STDIN_TEXT:
        raise UsageError(f"the text on standard input is over {MAX_STDIN_TEXT >> 20} MiB", "shorten it")
    if b"\0" in data:
        raise UsageError("standard input holds no text", "for an image on standard input, give `-` as IMAGE")
    return data.decode("utf-8", "replace")


def choose_pair(ctx: click.Context, reporter: Reporter) -> Pair:
    """The pair that flags, environment and settings mean; without any, the largest that fits, else the demo pair.

    Files given one by one replace members of a pair that was named at the same place or farther from the user: a
    ``--model`` flag replaces the model of LOCALVLM_PAIR, and a ``--pair`` flag overrules LOCALVLM_MODEL.
    """
    from localvlm.catalog import DEMO, as_pair, default_entry, entry_named, located

    values: dict[str, Any] = ctx.params
    name = values.get("pair")
    config = user_config(ctx)
    given = {
        key: _file(ctx, key)
        for key in ("guide", "guide_mmproj", "model", "mmproj")
        if values.get(key) and rank(ctx, key) >= rank(ctx, "pair")
    }
    if name is None and not (given.keys() & {"guide", "model"}):
        if given:
            raise UsageError("a projector was given without its model", "pass --model (or --guide) as well")
        entry = default_entry(config.pairs)
        if entry.name == DEMO:
            reporter.note("demo pair: knows drawn scenes only; for photos pass --model and --mmproj of another VLM")
        return as_pair(entry.name, entry.files)
    found = located(given)
    if name is None:
        return as_pair(None, found)
    files = dict(entry_named(name, config.pairs).files)
    for role, projector in (("guide", "guide_mmproj"), ("model", "mmproj")):
        if role in given:
            files.pop(projector, None)  # another model needs another projector
    return as_pair(None if given else name, {**files, **found})


def exit_threshold(ctx: click.Context, pair: Pair, reporter: Reporter) -> float | None:
    """The score from which the guide's answer is final, None for never: as set, else as calibrated.

    A method that is not SGL's turns early exit off, unless --exit-at was set at the same place or nearer to the user;
    so do --guide-keep, --schema and another bound of the guide's image tokens what was calibrated, which is of free
    answers to what it saw then. Without a guide, only the command line's --exit-at is asked for, and refused later.
    """
    method, value = ctx.params["method"], ctx.params["exit_at"]
    other = ctx.params["guide_keep"] is not None or ctx.params.get("schema") is not None
    if method == "auto":
        method = "sgl+"
    follows = method in ("sgl", "sgl+")
    if pair.guide is None and not on_command_line(ctx, "exit_at"):
        return None
    if value is not None and (follows or rank(ctx, "exit_at") >= rank(ctx, "method")):
        return None if value == "off" else float(value)
    if not follows or pair.guide is None or pair.model is None or other:
        return None
    from localvlm.calibration import stored

    found, why = stored(pair, method), "is not calibrated"
    if found is not None:
        then = found.image_tokens
        if then is None:
            then = guide_image_tokens({"guide_image_max_tokens": 0, "image_max_tokens": 0}, pair)
        if guide_image_tokens(ctx.params, pair) == then:
            return found.threshold
        why = "was calibrated for another bound of the guide's image tokens"
    if reporter.verbose or reporter.terminal:
        reporter.note(
            f"early exit is off, as this pair {why}: `localvlm calibrate DATA.jsonl` finds when the guide's "
            "answer will do; --exit-at sets it by hand, and --exit-at off ends this note"
        )
    return None


def _file(ctx: click.Context, key: str) -> Path | Reference:
    """The file that an option names, or what it is called on the hub.

    Raises:
        ModelNotFound: there is no such file, and it is what a pair is called.
    """
    from localvlm.catalog import pair_names, reference

    path = Path(ctx.params[key]).expanduser()
    if ctx.get_parameter_source(key) is click.core.ParameterSource.DEFAULT_MAP:
        path = user_config(ctx).path.parent / path
    if path.exists():
        return path
    name = ctx.params[key]
    if name in pair_names(user_config(ctx).pairs):
        raise ModelNotFound(f"model file {name!r} does not exist", f"for the pair of that name pass --pair {name}")
    return reference(name) or path
