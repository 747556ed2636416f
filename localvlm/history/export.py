"""A conversation as files: Markdown with its pictures beside it, which is safe to show, and JSON, which is exact.

In Markdown, text of people and models stays within the quotation that it is put into, and calls nothing: control
sequences are removed, a question is shown letter for letter, and so is an answer with HTML, pictures or links in it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from localvlm.errors import ImageError, StorageError
from localvlm.history.records import ConversationSummary, StoredImage, StoredTurn
from localvlm.sanitize import sanitize

__all__ = ["MARKDOWN", "as_json", "export"]

MARKDOWN = "conversation.md"
_SHOWN = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Files that programs which show Markdown can show; others are written as PNG."""
_CALLS = re.compile(r"<[A-Za-z/!?]|!\[|\][(:\[]")
"""HTML, pictures and links, which could hide text, fetch what they name, or lead elsewhere."""
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
_LIST = re.compile(r"^(\d*)([-+=.):])")
_LONGEST_NAME = 40


def as_json(conversation: ConversationSummary, turns: Sequence[StoredTurn]) -> str:
    """All that is kept of a conversation, in ASCII: lone surrogates and control characters are written as escapes."""
    content = dataclasses.asdict(conversation) | {"turns": [dataclasses.asdict(turn) for turn in turns]}
    return json.dumps(content, default=_plain, indent=2)


def _plain(value: object) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def export(conversation: ConversationSummary, turns: Sequence[StoredTurn], folder: Path) -> Path:
    """Writes the Markdown file and the pictures into a new folder in ``folder``, whole or not at all.

    Pictures are copied from where they were, if their pixels are still the same; the file says so if not.

    Returns:
        The Markdown file.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        try:
            text = "\n\n".join(_blocks(conversation, turns, work)) + "\n"
            (work / MARKDOWN).write_text(text, encoding="utf-8")
            done = work.rename(_free(folder, conversation))
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except OSError as error:
        where = f"'{error.filename or folder}' cannot be written: {error.strerror or error}"
        raise StorageError(where, "free some space, or name another folder") from error
    return done / MARKDOWN


def _free(folder: Path, conversation: ConversationSummary) -> Path:
    """A new folder, named after the day and the title."""
    title = re.sub(r"\W+", "-", sanitize(conversation.title))[:_LONGEST_NAME].strip("-_")
    name = "-".join(filter(None, [_time(conversation.created)[:10], title]))
    for number in range(1, 10_000):
        path = folder / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise StorageError(f"'{folder}' has 10,000 exports named {name!r}", "name another folder")


# ---- text --------------------------------------------------------------------------------------------------------


def _blocks(conversation: ConversationSummary, turns: Sequence[StoredTurn], folder: Path) -> Iterator[str]:
    pictures = _Pictures(folder)
    yield f"# {_line(conversation.title) or 'Conversation'}"
    pair = "" if conversation.pair is None else f", with the pair {_line(conversation.pair)}"
    yield f"Begun {_time(conversation.created)}{pair}. Written by localvlm."
    if conversation.system:
        yield from ("**System prompt**", _quoted(_literal(conversation.system)))
    for number, turn in enumerate(turns, 1):
        yield f"## {number}"
        for image in turn.images:
            yield pictures.told(image)
        yield from (f"**You**, {_time(turn.created)}", _quoted(_literal(turn.question)))
        yield _how(turn)
        if turn.answer.strip():
            yield _quoted(_markdown(turn.answer))
        if turn.guide_text is not None and turn.guide_text.strip() != turn.answer.strip():
            yield from ("**The guide's draft**", _quoted(_markdown(turn.guide_text)))


def _how(turn: StoredTurn) -> str:
    """Who answered, from how much, and in what time."""
    who = {"guide": "**The guide**", "model": "**The model**"}.get(turn.answered_by or "", "**No answer**")
    told = [who] if turn.status == "done" else [who, turn.status]
    if turn.tokens is not None and turn.tokens.kept is not None:
        told.append(f"from {turn.tokens.kept} of {turn.tokens.image} image tokens")
    if "total" in turn.ms:
        told.append(f"{turn.ms['total'] / 1e3:.1f} s")
    return ", ".join(told)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _line(text: str) -> str:
    """Text within a line, letter for letter."""
    return _MARKS.sub(r"\\\1", " ".join(sanitize(text).split()))


def _literal(text: str) -> str:
    """Text as Markdown that shows it letter for letter, line by line."""
    lines = []
    for line in sanitize(text).strip("\n").split("\n"):
        bare = line.lstrip()
        marked = _LIST.sub(r"\1\\\2", _MARKS.sub(r"\\\1", bare))
        lines.append("\N{NO-BREAK SPACE}" * len(line[: len(line) - len(bare)].expandtabs(4)) + marked.rstrip())
    broken = [line + "\\" * bool(line and after) for line, after in zip(lines, [*lines[1:], ""], strict=True)]
    return "\n".join(broken)


def _markdown(text: str) -> str:
    """An answer, which is Markdown: as it is, or in a block of code if it would call anything."""
    safe = sanitize(text).strip("\n")
    if not _CALLS.search(safe):
        return safe
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", safe)), default=0))
    return f"{fence}text\n{safe}\n{fence}"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


# ---- pictures ----------------------------------------------------------------------------------------------------


class _Pictures:
    """Copies of the pictures, one of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[bytes, str] = {}

    def told(self, image: StoredImage) -> str:
        """Where the copy is, or why there is none."""
        name = self._names.get(image.sha256)
        if name is None:
            try:
                name = self._names[image.sha256] = self._copy(image)
            except ImageError as error:
                return f"*{_line(Path(image.name).name)} is not included: {_line(error.message)}*"
        return f"![{_line(Path(image.name).name)}]({name})"

    def _copy(self, image: StoredImage) -> str:
        from localvlm.images import load

        data = _read(image)
        found = load(data, image.name, image.page, apart=True)
        if found.content != image.sha256:
            raise ImageError("the picture there is another one now")
        suffix = image.path.suffix.lower() if image.path else ""
        if suffix not in _SHOWN:
            import PIL.Image

            suffix, buffer = ".png", io.BytesIO()
            PIL.Image.fromarray(found.rgb).save(buffer, "PNG")
            data = buffer.getvalue()
        name = f"picture-{len(self._names) + 1}{suffix}"
        (self._folder / name).write_bytes(data)
        return name


def _read(image: StoredImage) -> bytes:
    """The file's content, from a regular file of bearable size.

    Raises:
        ImageError: there is none.
    """
    from localvlm.images import MAX_BYTES

    if image.path is None:
        raise ImageError("it came from no file")
    try:
        with os.fdopen(os.open(image.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ImageError("what is there is no picture")
            return file.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError("the file is gone") from error
    except (OSError, ValueError) as error:
        raise ImageError("the file cannot be read") from error
