"""What is kept of a conversation: plain data, and how it lies in the columns of the tables."""

from __future__ import annotations

import dataclasses
import json
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localvlm.answers import Answer, TokenCounts
    from localvlm.early_exit import Score
    from localvlm.images import Image

__all__ = [
    "STATUSES",
    "ConversationSummary",
    "StoredImage",
    "StoredTurn",
    "folded",
    "image_of",
    "image_row",
    "moment",
    "pack",
    "turn_of",
    "turn_row",
    "unpack",
]

STATUSES = ("done", "interrupted", "failed")
"""How a turn may have ended; an interrupted one holds the answer as far as it came."""


@dataclass(frozen=True)
class StoredImage:
    """A picture that came with a question.

    Attributes:
        name: how the user called it.
        path: absolute; None of one that has none, such as from the clipboard.
        sha256: ``Image.content``, 32 bytes: of size and pixels, whatever the file is.
        page: of a PDF, from 1 on.
    """

    name: str
    path: Path | None
    sha256: bytes
    width: int
    height: int
    page: int | None = None

    @classmethod
    def of(cls, image: Image, path: Path | None, page: int | None = None) -> StoredImage:
        """What is kept of ``image``."""
        from localvlm.sources import place_of

        return cls(image.name, None if path is None else place_of(path), image.content, *image.size, page)


@dataclass(frozen=True)
class StoredTurn:
    """A question and what came of it.

    Attributes:
        answer: as the model wrote it, nothing removed; as far as it came, if ``status`` is not "done".
        answered_by: "guide" or "model"; None: neither did.
        status: of STATUSES.
        guide_text: the guide's own answer; None: it gave none.
        images: that came with this question.
        pair: that answered, if it has a name.
        method, keep, tokens, score, threshold, ms: as in :class:`localvlm.answers.Answer`.
        created: seconds since 1970, UTC.
        id: in the history; None until it is read from there.
    """

    question: str
    answer: str
    answered_by: str | None
    status: str = "done"
    guide_text: str | None = None
    images: tuple[StoredImage, ...] = ()
    pair: str | None = None
    method: str = ""
    keep: float | str = 1.0
    tokens: TokenCounts | None = None
    score: Score | None = None
    threshold: float | None = None
    ms: Mapping[str, float] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    id: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")

    @classmethod
    def of(cls, question: str, answer: Answer, images: Sequence[StoredImage] = ()) -> StoredTurn:
        """What is kept of a question that was answered."""
        return cls(
            question,
            answer.text,
            answer.answered_by,
            guide_text=answer.guide_text,
            images=tuple(images),
            pair=answer.pair,
            method=answer.method,
            keep=answer.keep,
            tokens=answer.tokens,
            score=answer.score,
            threshold=answer.threshold,
            ms=dict(answer.ms),
        )


@dataclass(frozen=True)
class ConversationSummary:
    """A conversation in a list.

    Attributes:
        pair: it was begun with, if that has a name.
        system: prompt it was begun with.
        turns, images: how many it has.
        created: seconds since 1970, UTC.
        updated: when the last turn was added, or taken back.
    """

    id: int
    title: str
    pair: str | None
    system: str | None
    turns: int
    images: int
    created: float
    updated: float


# ---- columns -----------------------------------------------------------------------------------------------------

_LATEST = 253_402_214_400
"""A day before the year 10,000, which no calendar shows, in any zone of time."""
_BEYOND = 1e15
"""No count and no time comes to it."""
_MAY_LACK = ("kept", "mean_kept", "guide")
"""Of TokenCounts."""


def pack(text: str | None) -> bytes | None:
    """Text as it is kept: exactly, lone surrogates and NUL too, which SQLite's own text does not hold."""
    return None if text is None else text.encode("utf-8", "surrogatepass")


def unpack(data: bytes) -> str:
    """What :func:`pack` was given."""
    return data.decode("utf-8", "surrogatepass")


def _maybe(data: bytes | None) -> str | None:
    return None if data is None else unpack(data)


def folded(text: str) -> str:
    """Text as it is searched: without case or forms of width, and valid for SQLite."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return plain.replace("\0", " ").encode("utf-8", "replace").decode()


def turn_row(turn: StoredTurn) -> dict[str, Any]:
    """The columns of a turn, but those that say where it belongs."""
    details = {
        "keep": turn.keep,
        "tokens": None if turn.tokens is None else dataclasses.asdict(turn.tokens),
        "score": None if turn.score is None else dataclasses.asdict(turn.score),
        "threshold": turn.threshold,
        "ms": dict(turn.ms),
    }
    return {
        "created": turn.created,
        "question": pack(turn.question),
        "answer": pack(turn.answer),
        "guide_text": pack(turn.guide_text),
        "answered_by": turn.answered_by,
        "status": turn.status,
        "pair": pack(turn.pair),
        "method": turn.method,
        "details": json.dumps(details, default=lambda value: value.item()),  # numbers of numpy, too
        "folded": folded("\n".join([turn.question, turn.answer, *(image.name for image in turn.images)])),
    }


def turn_of(row: Mapping[str, Any], images: Sequence[StoredImage]) -> StoredTurn:
    """The turn in a row of its table."""
    from localvlm.answers import TokenCounts
    from localvlm.early_exit import Score

    details = json.loads(row["details"])
    tokens, score, threshold, keep = (details[name] for name in ("tokens", "score", "threshold", "keep"))
    return StoredTurn(
        unpack(row["question"]),
        unpack(row["answer"]),
        None if row["answered_by"] is None else _kind(row["answered_by"], str),
        row["status"],
        _maybe(row["guide_text"]),
        tuple(images),
        _maybe(row["pair"]),
        _kind(row["method"], str),
        keep if isinstance(keep, str) else _number(keep),
        None if tokens is None else TokenCounts(**{k: _number(n, k in _MAY_LACK) for k, n in tokens.items()}),
        None if score is None else Score(**{name: float(_kind(share, int, float)) for name, share in score.items()}),
        None if threshold is None else float(_kind(threshold, int, float)),
        {stage: _number(ms) for stage, ms in details["ms"].items()},
        moment(row["created"]),
        row["id"],
    )


def image_row(image: StoredImage) -> dict[str, Any]:
    """The columns of a picture, but those that say where it belongs."""
    return {
        "name": pack(image.name),
        "path": None if image.path is None else pack(str(image.path)),
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "page": image.page,
    }


def image_of(row: Mapping[str, Any]) -> StoredImage:
    """The picture in a row of its table."""
    path = None if row["path"] is None else Path(unpack(row["path"]))
    width, height = (_kind(row[name], int) for name in ("width", "height"))
    page = None if row["page"] is None else _kind(row["page"], int)
    return StoredImage(unpack(row["name"]), path, _kind(row["sha256"], bytes), width, height, page)


def moment(value: Any) -> float:
    """A column's seconds since 1970, if a calendar has them."""
    if not 0 <= _number(value) < _LATEST:
        raise ValueError(value)
    return float(value)


def _number(value: Any, may_lack: bool = False) -> Any:
    """A column's number, if it can be reckoned with."""
    if not (value is None and may_lack) and not abs(_kind(value, int, float)) < _BEYOND:
        raise ValueError(value)
    return value


def _kind(value: Any, *kinds: type) -> Any:
    """A column's value, if it is of one of these kinds; SQLite itself takes any."""
    if not isinstance(value, kinds):
        raise TypeError(value)
    return value
