"""What people write or drop where a picture is wanted: paths, quoted or escaped, patterns, pages of PDFs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from localvlm.errors import ImageError
from localvlm.images import Image, load

__all__ = ["MAX_PAGES", "Source", "is_url", "place_of", "sources", "unwrapped"]

MAX_PAGES = 1000
"""Most pages that one name stands for."""
_QUOTES = ("''", '""', "\u2018\u2019", "\u201c\u201d")
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Source:
    """Where one picture comes from.

    Attributes:
        name: what it is called; the same for the same picture, given again.
        load: reads it; raises ImageError as :func:`localvlm.images.load`.
        path: where it lies; None of standard input and of the web.
        page: of a PDF, if one was named.
    """

    name: str
    load: Callable[[], Image]
    path: Path | None = None
    page: int | None = None


def is_url(name: str) -> bool:
    """Whether it is an address in the web."""
    return name.lower().startswith(("http://", "https://"))


def sources(name: str, *, apart: bool = False) -> list[Source]:
    """The pictures that ``name`` stands for: a file as it is written, else without the quotes and escapes that a
    terminal puts around a path dropped on it, else the files that a pattern finds, sorted. ``#2-4`` behind a PDF's name
    are its pages. What is none of these is taken for a path, which loading it will refuse. ``apart``: each is decoded
    in a process of its own.

    Raises:
        ImageError: a pattern finds nothing, or pages are not numbers.
    """
    if name == "-":
        return [Source(name, partial(load, name))]
    if is_url(name):
        return [_file(name, apart=apart)]
    texts = list(dict.fromkeys((name, *unwrapped(name))))
    for text in texts:
        if os.path.lexists(_home(text)):
            return [_file(text, apart=apart)]
        path, _, pages = text.rpartition("#")
        if path and os.path.lexists(_home(path)):
            return [_file(path, number, apart=apart) for number in _numbers(pages)]
    for text in filter(glob.has_magic, texts):
        paths = glob.iglob(_home(text), recursive=True)  # noqa: PTH207 - of any root
        if files := sorted(path for path in paths if not Path(path).is_dir()):
            return [_file(path, apart=apart) for path in files]
    if glob.has_magic(name):
        raise ImageError(f"no file matches {name!r}", "check the pattern")
    return [_file(name, apart=apart)]


def _file(path: str, page: int | None = None, *, apart: bool = False) -> Source:
    name = path if page is None else f"{path}#{page}"
    place = None if is_url(path) else place_of(_home(path))
    return Source(name, partial(load, _home(path), name, page, apart=apart), place, page)


def place_of(path: str | Path) -> Path:
    """Where a file lies, absolute; ``..`` behind a link to a folder means what it means to the system."""
    place = Path(path).absolute()
    return Path(os.path.realpath(place.parent), place.name) if ".." in place.parts else place


def _home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises where there is no such user


def unwrapped(text: str) -> list[str]:
    """The path in what a terminal or a file manager makes of it."""
    bare = text.strip()
    if len(bare) > 1 and bare[0] + bare[-1] in _QUOTES:
        return [bare, bare[1:-1].replace(r"'\''", "'")]
    if bare.lower().startswith("file://"):
        return [bare, unquote(urlsplit(bare).path)]
    return [bare, re.sub(r"\\(.)", r"\1", bare)]


def _numbers(pages: str) -> list[int]:
    """What "2-4,7" stands for, in that order."""
    found: list[int] = []
    for part in pages.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ImageError(f"{pages!r} does not number pages", "write them as in doc.pdf#2-4 or doc.pdf#1,7")
        if len(found) + last - first >= MAX_PAGES:
            raise ImageError(f"pages {pages!r} are over {MAX_PAGES}", "ask about fewer at a time")
        found += range(first, last + 1)
    return found
