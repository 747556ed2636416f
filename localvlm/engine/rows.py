"""A prompt as rows: what each KV cell will hold, and the position it would have had with nothing pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.native import ROW_LAST, ROW_PROMPT
from localvlm.engine.tower import Picture, Piece

__all__ = ["SOURCE", "Placed", "PromptRows", "Run", "lay_rows", "with_ends"]

Int32 = NDArray[np.int32]

SOURCE = 1
"""Column of :attr:`PromptRows.keys` that tells the picture; -1 for text."""


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one kind: ``picture`` None is text. [start, stop) in the prompt's rows."""

    start: int
    stop: int
    picture: Picture | None


@dataclass(frozen=True)
class PromptRows:
    """All rows of a prompt.

    Attributes:
        ids: (n_rows,) token ids, -1 at image tokens, -2 at rows of a picture that show nothing.
        positions: (n_rows, 3) t, y, x as if nothing was pruned.
        image: (n_rows,) index of the image token in the unpruned prompt, joint over all pictures; -1 for text.
        source: (n_rows,) number of the picture that the row is of; -1 for text.
        local: (n_rows,) index of the row in its own picture's embeddings; -1 for text. Rows of a picture that show
            nothing (the ends of its rows) have a ``local`` and no ``image``.
        classes: (n_rows,) uint8 bits of enum lv_row_class.
        runs: the rows cut where text and pictures meet.
        n_image: image tokens before pruning.
        next_position: of the first row after the prompt.
        all_ids: the unpruned prompt, likewise.
    """

    ids: Int32
    positions: Int32
    image: Int32
    source: Int32
    local: Int32
    classes: NDArray[np.uint8]
    runs: tuple[Run, ...]
    n_image: int
    next_position: int
    all_ids: Int32

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def n_kept(self) -> int:
        return int(np.count_nonzero(self.image >= 0))

    @property
    def tokens(self) -> Int32:
        """(n_kept,) indices of the image tokens that are there."""
        return self.image[self.image >= 0]

    def compact(self) -> PromptRows:
        """The same rows, numbered without gaps."""
        steps = np.arange(self.n, dtype=np.int32)
        return replace(self, positions=np.repeat(steps[:, None], 3, axis=1), next_position=self.n)

    def staying(self, kept: Int32) -> NDArray[np.bool_]:
        """(n_rows,) the rows that stay with the image tokens ``kept``: text, these, and the ends of their lines."""
        stays = np.zeros(self.n_image, bool)
        stays[kept] = True
        rows = self.source < 0
        for number in np.unique(self.source[~rows]):
            here = self.source == number
            rows[here] = with_ends(self.image[here], stays)
        return rows

    def only(self, stays: NDArray[np.bool_]) -> PromptRows:
        """The rows that stay (n_rows,), as if the others had been pruned from the start."""
        places = np.concatenate([[0], np.cumsum(stays)])
        runs: list[Run] = []
        for run in self.runs:
            start, stop = int(places[run.start]), int(places[run.stop])
            if start == stop:
                continue
            if runs and run.picture is None and runs[-1].picture is None:
                start = runs.pop().start
            runs.append(Run(start, stop, run.picture))
        return replace(
            self,
            ids=self.ids[stays],
            positions=self.positions[stays],
            image=self.image[stays],
            source=self.source[stays],
            local=self.local[stays],
            classes=self.classes[stays],
            runs=tuple(runs),
        )

    @property
    def keys(self) -> Int32:
        """(n_rows, 6): two prompts agree in a row if they agree in this and in all rows before it."""
        return np.column_stack([self.ids, self.source, self.local, self.positions])


class _Builder:
    def __init__(self) -> None:
        self.ids: list[Int32] = []
        self.positions: list[Int32] = []
        self.image: list[Int32] = []
        self.source: list[Int32] = []
        self.local: list[Int32] = []
        self.all_ids: list[Int32] = []
        self.runs: list[Run] = []
        self.rows = self.position = self.n_image = 0
        self.after: int | None = None
        """The row after the last one of a picture."""
        self.placed: list[tuple[list[int], int, list[NDArray[np.bool_]]]] = []
        """Of each picture: positions at which its pieces begin, the index of its first token, and of each piece the
        rows that are there.
        """

    def text(self, ids: Sequence[int] | Int32) -> None:
        if not len(ids):
            return
        values = np.asarray(ids, np.int32)
        n = len(values)
        steps = np.arange(self.position, self.position + n, dtype=np.int32)
        none = np.full(n, -1, np.int32)
        self._rows(values, np.repeat(steps[:, None], 3, axis=1), none, none, None, -1)
        self.all_ids.append(values)
        self.position += n

    def picture(self, placed: Placed) -> None:
        picture, stays = placed.picture, placed.stays()
        starts: list[int] = []
        there: list[NDArray[np.bool_]] = []
        self.placed.append((starts, self.n_image, there))
        for piece in picture.pieces:
            starts.append(self.position)
            there.append(np.zeros(0, bool) if not piece.n else with_ends(piece.token, stays))
            if not piece.n:
                self.text(piece.ids)
                continue
            self._piece(placed, piece, there[-1], self.position, self.n_image)
            self.all_ids.append(np.where(piece.token >= 0, -1, -2).astype(np.int32))
            self.position += piece.n_pos
            self.after = self.rows
        self.n_image += picture.layout.n_tokens

    def again(self, placed: Placed, number: int) -> None:
        """More tokens of picture ``number`` of the prompt, and the ends of their lines that are not there yet."""
        starts, first, there = self.placed[number]
        stays = placed.stays()
        for i, (piece, at) in enumerate(zip(placed.picture.pieces, starts, strict=True)):
            if piece.n:
                rows = with_ends(piece.token, stays) & ~there[i]
                self._piece(placed, piece, rows, at, first)
                there[i] = there[i] | rows
        self.after = self.rows

    def _piece(self, placed: Placed, piece: Piece, rows: NDArray[np.bool_], at: int, first: int) -> None:
        """Some ``rows`` of a piece at position ``at``, of a picture whose first token has index ``first``."""
        kept = np.flatnonzero(rows).astype(np.int32)
        if len(kept):
            shows = piece.token[kept] >= 0
            image = np.where(shows, piece.token[kept] + np.int32(first), -1).astype(np.int32)
            ids = np.where(shows, -1, -2).astype(np.int32)
            places = piece.relative[kept] + np.int32(at)
            self._rows(ids, places, image, kept + np.int32(piece.first), placed.picture, placed.number)

    def _rows(
        self, ids: Int32, places: Int32, image: Int32, local: Int32, picture: Picture | None, number: int
    ) -> None:
        start, n = self.rows, len(ids)
        if self.runs and picture is None and self.runs[-1].picture is None:
            self.runs[-1] = Run(self.runs[-1].start, start + n, None)
        else:
            self.runs.append(Run(start, start + n, picture))
        self.ids.append(ids)
        self.positions.append(places)
        self.image.append(image)
        self.source.append(np.full(n, number, np.int32))
        self.local.append(local)
        self.rows += n


@dataclass(frozen=True)
class Placed:
    """A picture in a prompt.

    Attributes:
        keep: the sorted indices of its kept tokens, or None for all.
        number: by which the picture is known.
        again: which of the prompt's pictures it is more of, None if it is another one.
    """

    picture: Picture
    keep: Int32 | None
    number: int = 0
    again: int | None = None

    def stays(self) -> NDArray[np.bool_]:
        """(n_tokens,) whether a token is kept."""
        stays = np.ones(self.picture.layout.n_tokens, bool)
        if self.keep is not None:
            stays[:] = False
            stays[self.keep] = True
        return stays


def with_ends(token: Int32, stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,) the rows of a picture that are there: kept tokens, and of rows that show nothing, which end lines, those
    whose line has one.

    Args:
        token: (n,) the image token of each row, -1 where it shows nothing.
        stays: (n_tokens,) whether a token is kept; where all are, all rows are there.
    """
    if stays.all():
        return np.ones(len(token), bool)
    shows = token >= 0
    rows = shows & stays[token]
    line: NDArray[np.intp] = np.cumsum(~shows) - ~shows  # an end is of the line before it
    return np.asarray(rows | (~shows & np.isin(line, line[rows])))


def _joined(arrays: Sequence[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


def lay_rows(parts: Sequence[Sequence[int] | Placed], since: int = 0) -> PromptRows:
    """Lays out token ids and pictures, in order.

    Wrapper texts of a picture stay whatever is dropped. Text rows of ``parts[since:]`` after the last image token are
    of class "prompt", the very last also of class "last".
    """
    b = _Builder()
    first = 0
    for i, part in enumerate(parts):
        if i == since:
            first = b.rows
        if not isinstance(part, Placed):
            b.text(part)
        elif part.again is None:
            b.picture(part)
        else:
            b.again(part, part.again)
    ids = _joined(b.ids)
    classes = np.zeros(len(ids), np.uint8)
    if b.after is not None and b.after < len(ids):
        classes[max(b.after, first) :] |= ROW_PROMPT
        classes[-1] |= ROW_LAST
    return PromptRows(
        ids=ids,
        positions=_joined(b.positions).reshape(-1, 3),
        image=_joined(b.image),
        source=_joined(b.source),
        local=_joined(b.local),
        classes=classes,
        runs=tuple(b.runs),
        n_image=b.n_image,
        next_position=b.position,
        all_ids=_joined(b.all_ids),
    )
