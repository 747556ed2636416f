"""Questions with their answers, read from our own JSONL or a public format, which is known by its shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localvlm.errors import UsageError
from localvlm.evaluation.formats import FORMATS, Format, Malformed, Row

__all__ = ["Dataset", "Question", "read_dataset"]

_HINT = 'write {"image": "a.png", "question": "...", "answer": "..."} a line, or give a file of ' + ", ".join(
    f.name for f in FORMATS[1:]
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        images: files of its pictures.
        answers: right answers, at least one; those of several people where ``rule`` is "vqa".
        kind: type of the question, "" if it has none.
        rule: how answers are scored (``scoring.RULES``).
    """

    id: str
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...]
    kind: str
    rule: str


@dataclass(frozen=True)
class Dataset:
    """Questions and the name of the format they were written in."""

    format: str
    questions: tuple[Question, ...]

    def first(self, n: int | None) -> Dataset:
        """The first ``n`` questions, or all."""
        return replace(self, questions=self.questions[:n])


def read_dataset(
    path: Path,
    answers: Path | None = None,
    images: Path | None = None,
    rule: str | None = None,
    suffix: str = "",
) -> Dataset:
    """Reads ``path``, whose format is known by its shape.

    Args:
        path: JSONL or JSON.
        answers: second file, for formats that keep the answers apart.
        images: folder of the pictures, if not that of ``path``.
        rule: scores all questions, whatever the format says.
        suffix: added to every question, after a line break.

    Raises:
        UsageError: a file cannot be read or is none of the formats, or an entry lacks what it needs.
    """
    content = _parse(path)
    found = next((f for f in FORMATS if f.knows(content)), None)
    if found is None:
        raise UsageError(f"'{path}' is in no format that is known here", _HINT)
    if (answers is None) == found.apart:
        raise UsageError(*_about_answers(path, found))
    try:
        rows = found.rows(content, None if answers is None else _parse(answers))
        folder = path.parent if images is None else images
        questions = tuple(_question(i, row, folder, rule, suffix) for i, row in enumerate(rows, 1))
    except Malformed as error:
        raise UsageError(f"'{path}', read as {found.name}: {error}", _HINT) from error
    if not questions:
        raise UsageError(f"'{path}' holds no questions", _HINT)
    return Dataset(found.name, questions)


def _about_answers(path: Path, found: Format) -> tuple[str, str]:
    if found.apart:
        return f"'{path}' is in the format {found.name}, whose answers are in another file", "pass it with --answers"
    return f"'{path}' is in the format {found.name}, which holds its answers itself", "leave out --answers"


def _question(number: int, row: Row, folder: Path, rule: str | None, suffix: str) -> Question:
    if not row.answers:
        raise Malformed(number, "has no answer")
    text = f"{row.text}\n{suffix}" if suffix else row.text
    images = tuple(str(folder / image) for image in row.images)
    return Question(row.id or str(number), images, text, row.answers, row.kind, rule or row.rule)


def _parse(path: Path) -> Any:
    """The content of a JSON file, or the list of the objects of a JSONL file, whatever its name ends in."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}", "check the path") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"'{path}' is empty", _HINT)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not lines[0][1].rstrip().endswith("}"):
            raise UsageError(f"'{path}' is not JSON: {error}", _HINT) from error
        return [_entry(line, f"line {n} of '{path}'") for n, line in lines]
    one_line = isinstance(content, dict) and not content.keys().isdisjoint(("question", "question_id"))
    return [content] if one_line else content


def _entry(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}", _HINT) from error
