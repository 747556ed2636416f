"""Files to pick from: what a folder holds, and paths as they are written behind an ``@``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PICTURES", "Found", "Mention", "candidates", "filtered", "is_picture", "listed", "mention_before",
           "mentions", "quoted", "written"]  # fmt: skip

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
            ".tif", ".tiff", ".heic", ".heif", ".pdf")  # fmt: skip
"""Endings of the names of files that :func:`localvlm.images.load` may read; what they hold tells it only then."""
_PLAIN = re.compile(r"[^\s'\"\\\u2018\u2019\u201c\u201d]+")
"""Names that need no quotes: neither white space nor what quotes or escapes."""
_QUOTED = re.compile(r"'((?:[^']|'\\'')*)'|\"([^\"]*)\"")
_BARE = re.compile(r"(?:\\.|[^\s\\])+")
_AT = re.compile(r"(?:(?<=\s)|(?<=\()|^)@", re.MULTILINE)
"""An ``@`` that begins a word; others are of addresses."""


@dataclass(frozen=True)
class Found:
    """A folder or a picture in a folder, by the name it has there; ``size`` in bytes."""

    name: str
    folder: bool
    size: int = 0


def is_picture(name: str) -> bool:
    """Whether a file of that name may be a picture."""
    return name.lower().endswith(PICTURES)


def listed(folder: Path, *, hidden: bool = False) -> list[Found]:
    """Folders, then pictures of ``folder``, each by name; nothing is read of the files themselves.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                continue
            try:
                if entry.is_dir():
                    found.append(Found(entry.name, True))
                elif is_picture(entry.name) and entry.is_file():
                    found.append(Found(entry.name, False, entry.stat().st_size))
            except OSError:  # gone meanwhile, or a link that leads nowhere
                continue
    return sorted(found, key=lambda one: (not one.folder, _natural(one.name)))


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts img2 before img10, and without regard to case."""
    parts = re.split(r"([0-9]{1,18})", name.casefold())
    return tuple(
        (part.isascii() and part.isdigit(), int(part) if part.isascii() and part.isdigit() else 0, part)
        for part in parts
    )


# ---- @ -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    """A path behind an ``@`` of a text.

    Attributes:
        start, end: of ``@`` and path in the text.
        written: the path as it stands there, with quotes and escapes, as :func:`localvlm.sources.sources` takes it.
        path: without these.
    """

    start: int
    end: int
    written: str
    path: str


def mentions(text: str) -> Iterator[Mention]:
    """The paths behind each ``@`` that begins a word: in quotes, with escaped spaces, or up to the next space."""
    end = 0
    for at in _AT.finditer(text):
        if at.start() < end:
            continue
        if found := _QUOTED.match(text, at.end()):
            path = found[1].replace(r"'\''", "'") if found[1] is not None else found[2]
        elif found := _BARE.match(text, at.end()):
            path = re.sub(r"\\(.)", r"\1", found[0])
        if found and path:
            end = found.end()
            yield Mention(at.start(), end, found[0], path)


def mention_before(text: str) -> Mention | None:
    """The path that is being written at the end of ``text``, the text before a cursor; an open quote is of it."""
    for at in reversed(list(_AT.finditer(text))):
        rest = text[at.end() :]
        if rest[:1] in ("'", '"'):
            quote, body = rest[0], rest[1:]
            open_body = body.replace(r"'\''", "") if quote == "'" else body
            if quote not in open_body:
                return Mention(at.start(), len(text), rest, body.replace(r"'\''", "'") if quote == "'" else body)
            continue
        if not rest or ((found := _BARE.match(rest)) and found.end() == len(rest)) or rest.endswith("\\"):
            return Mention(at.start(), len(text), rest, re.sub(r"\\(.)", r"\1", rest))
    return None


def quoted(path: str) -> str:
    """A path as it is written into a text, such that :func:`mentions` and :func:`localvlm.sources.sources` read it."""
    return path if _PLAIN.fullmatch(path) else "'" + path.replace("'", r"'\''") + "'"


def written(candidate: str) -> str:
    """What one of :func:`candidates` puts into the text: a picture with a space behind it, a folder so that what is in
    it can be written on, with its quote left open.
    """
    text = quoted(candidate)
    return f"{text} " if not candidate.endswith("/") else text[:-1] if text.endswith("'") else text


def candidates(path: str, folder: Path, most: int = 50) -> list[str]:
    """Paths that ``path`` may become, as they are written from ``folder``: pictures first, then folders (with a slash
    at the end), of each those that begin so before those that hold it. Names that do not fit on a line are left out.
    """
    _, _, tail = path.rpartition("/")
    prefix = path[: len(path) - len(tail)]
    place = folder / os.path.expanduser(prefix or ".")  # noqa: PTH111 - pathlib's raises where there is no such user
    try:
        found = listed(place, hidden=tail.startswith("."))
    except OSError:
        return []
    wanted = tail.casefold()
    fitting = [one for one in found if wanted in one.name.casefold() and one.name.isprintable()]
    fitting.sort(key=lambda one: (one.folder, not one.name.casefold().startswith(wanted)))
    return [f"{prefix}{one.name}{'/' * one.folder}" for one in fitting[:most]]


def filtered(found: Sequence[Found], typed: str) -> list[Found]:
    """Those whose names hold all words that were typed, the ones that begin so first."""
    words = typed.casefold().split()
    kept = [one for one in found if all(word in one.name.casefold() for word in words)]
    return sorted(kept, key=lambda one: bool(words) and not one.name.casefold().startswith(words[0]))
