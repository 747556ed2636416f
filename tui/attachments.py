"""Pictures that come with a question: where they are from, read in a process of their own."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import is_picture

if TYPE_CHECKING:
    from localvlm.errors import LocalvlmError
    from localvlm.images import Image

__all__ = ["EXAMPLE", "MOST", "NO_FILE", "Attached", "from_clipboard", "from_name", "from_stored", "pasted_names"]

EXAMPLE = "example"
"""Names the bundled picture, unless there is a file of that name."""
MOST = 32
"""Pictures that a name may stand for, or that may be added to one question: each is held as it was decoded."""
NO_FILE = "give a picture file, or those of a folder as in FOLDER/*.jpg"
"""What to do where a name is of a folder, a device or the web."""
MOST_PASTED = 16_384
"""Characters of a paste that may be paths; longer ones are text."""
_AT_ONCE = threading.BoundedSemaphore(2)
"""Pictures that are decoded: each by a process of its own, with up to 120 MB of pixels."""


@dataclass(frozen=True, eq=False)
class Attached:
    """A picture and where it lies; ``path`` None: nowhere, such as one of the clipboard. ``page``: of a PDF. Equal to
    itself alone.
    """

    image: Image
    path: Path | None = None
    page: int | None = None


def from_name(name: str, unread: list[LocalvlmError] | None = None) -> list[Attached]:
    """The pictures that a path, a pattern or "example" stands for. Takes a quarter of a second for each. Where there
    are several, why one cannot be read is put into ``unread``.

    Raises:
        ImageError: one cannot be read, without ``unread`` or because it is the only one, or they are more than MOST.
    """
    from localvlm.errors import ImageError
    from localvlm.images import load
    from localvlm.sources import sources

    if name == EXAMPLE and not Path(name).exists():
        from localvlm.catalog import example_image

        return [Attached(load(example_image(), EXAMPLE), Path(example_image()))]
    found = sources(name, apart=True)
    if len(found) > MOST:
        raise ImageError(
            f"{name!r} stands for {len(found)} pictures, and a question takes at most {MOST}",
            "name fewer; `localvlm ask --jsonl` asks about each of many",
        )
    attached = []
    for source in found:
        try:
            with _AT_ONCE:
                attached.append(_content_known(Attached(source.load(), source.path, source.page)))
        except ImageError as error:
            if source.path is None or (source.path.exists() and not source.path.is_file()):
                error = ImageError(error.message, NO_FILE)  # the command line's hint names what is not here
            if unread is None or len(found) == 1:
                raise error from None
            unread.append(error)
    return attached


def from_clipboard() -> list[Attached]:
    """The picture that the clipboard of the desktop holds, or the file that was copied there.

    Raises:
        ImageError: there is none, or it cannot be read.
    """
    from localvlm.clipboard import picture_of_clipboard
    from localvlm.images import load

    found = picture_of_clipboard()
    if isinstance(found, str):
        return from_name(found)
    return [_content_known(Attached(load(found, "(clipboard)", apart=True)))]


def from_stored(path: Path, name: str, page: int | None, sha256: bytes) -> Attached:
    """A picture of the history.

    Raises:
        ImageError: it is not there any more, or is another one.
    """
    from localvlm.errors import ImageError
    from localvlm.images import load

    image = load(path, name, page, apart=True)
    if image.content != sha256:
        raise ImageError(f"image {name!r} has changed since", "add it anew to ask about it")
    return Attached(image, path, page)


def _content_known(attached: Attached) -> Attached:
    """Hashes the pixels now, in the thread that reads, and not later in one that must not wait."""
    _ = attached.image.content
    return attached


def pasted_names(text: str, exists: Callable[[str], bool] = os.path.isfile) -> list[str]:
    """The pictures whose paths make up all of a paste, as terminals write files that are dropped on them: bare, in
    quotes, with escaped spaces or as file://, one or several. Empty if it is anything else.
    """
    bare = text.strip()
    if not bare or len(bare) > MOST_PASTED or "\0" in bare:
        return []
    from localvlm.sources import unwrapped

    def picture(name: str) -> bool:
        forms = (os.path.expanduser(form.partition("#")[0]) for form in (name, *unwrapped(name)))  # noqa: PTH111
        return any(is_picture(form) and exists(form) for form in forms)

    if "\n" not in bare and picture(bare):
        return [bare]
    try:
        words = [word for line in bare.splitlines() for word in ([line] if picture(line) else shlex.split(line))]
    except ValueError:  # a quote that is not closed
        return []
    return words if words and all(map(picture, words)) else []
