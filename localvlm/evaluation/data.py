"""Questions with their answers, read from our own JSONL or a public format, which is known by its shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from localvlm.errors import UsageError
from localvlm.evaluation.formats import FORMATS, Format, Malformed, Row
from localvlm.json_files import read_json
from localvlm.scoring import said_yes

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
    content = read_json(path, _HINT)
    found = next((f for f in FORMATS if f.knows(content)), None)
    if found is None:
        raise UsageError(f"'{path}' is in no format that is known here", _HINT)
    if (answers is None) == found.apart:
        raise UsageError(*_about_answers(path, found))
    try:
        rows = found.rows(content, None if answers is None else read_json(answers, _HINT))
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
    rule = rule or row.rule
    if rule == "yes-no" and said_yes(row.answers[0]) is None:
        raise Malformed(number, f"is scored as yes or no, and its answer is {row.answers[0]!r}")
    text = f"{row.text}\n{suffix}" if suffix else row.text
    images = tuple(str(folder / image) for image in row.images)
    return Question(row.id or str(number), images, text, row.answers, row.kind, rule)
