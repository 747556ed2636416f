"""What a row of the zoo is: one tiny model of one family, and the cases it is compared on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tests.zoo.text import TextConfig
from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = [
    "NUMBER",
    "Case",
    "Drawing",
    "Grid",
    "Reference",
    "Row",
    "Spelling",
    "ZooModel",
    "cases",
    "filler",
    "positions",
    "standard_cases",
    "staying",
]

Int32 = NDArray[np.int32]
RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class Drawing:
    """A seeded picture of ``cell`` x ``cell`` pixel squares of random colours (cell 1 is noise). Integers alone, so it
    is the same everywhere."""

    width: int
    height: int
    cell: int
    seed: int

    def pixels(self) -> RGB:
        """(height, width, 3) uint8."""
        rows, columns = -(-self.height // self.cell), -(-self.width // self.cell)
        colours = np.random.RandomState(self.seed).randint(0, 256, (rows, columns, 3)).astype(np.uint8)
        large = colours.repeat(self.cell, axis=0).repeat(self.cell, axis=1)
        return np.ascontiguousarray(large[: self.height, : self.width])


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        segments: text (control tokens recognised), or the index of a picture.
        fed: tokens fed back after the prompt, fixed so that no tie can matter.
        keep: for each picture the tokens kept in the pruned run.
    """

    name: str
    segments: tuple[str | int, ...]
    images: tuple[Drawing, ...]
    fed: tuple[int, ...]
    keep: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grid:
    """A raster of image tokens in a prompt. ``ends``: rows that show nothing, id -2, stand "between" its rows, "after"
    each of them, or nowhere ("").
    """

    rows: int
    columns: int
    ends: str = ""

    def ids(self) -> list[int]:
        """-1 at image tokens, -2 at ends."""
        row = [-1] * self.columns + ([-2] if self.ends else [])
        ids = row * self.rows
        return ids[:-1] if self.ends == "between" else ids


Spelling = tuple[str | Grid, ...]
"""A picture in a prompt: control texts and grids."""
NUMBER = "{number}"
"""Stands in a text for how many pictures come before this one; pictures of a case are in order."""


def filler(first: int, n: int) -> str:
    """``n`` different sentences; 30 of them fill a batch of llama.cpp's (512 rows)."""
    return "".join(f"the thing at {i * i} is red and not {i}. " for i in range(first, first + n))


def standard_cases(
    start: str,
    ask: str,
    pictures: Sequence[tuple[Drawing, tuple[int, ...]]],
    *,
    first: str = "wide",
    blank: str = "",
    after: str = "",
    other: str = "the other",
    long: tuple[str, str] = (filler(1, 9), filler(10, 25)),
) -> tuple[Case, ...]:
    """A question about the first picture, one about the next two, and a long one about the fourth, if there is one.

    Args:
        start, ask: control texts before the prompt and after it.
        pictures: and the tokens of each that are kept.
        first: name of the first case.
        blank, after: between ``start`` and words, and between a picture and words.
        long: words before and after the fourth picture.
    """
    drawings, keeps = zip(*pictures, strict=True)
    return (
        Case(
            first,
            (start, 0, f"{after}what is the thing in red?{ask}"),
            drawings[:1],
            (83, 266, 7, 201, 40, 99),
            keeps[:1],
        ),
        Case(
            "two",
            (f"{start}{blank}look: ", 0, f"{after}and then {other}: ", 1, f"{after}what differs?{ask}"),
            drawings[1:3],
            (120, 33, 270, 64),
            keeps[1:3],
        ),
        Case("long", (f"{start}{blank}{long[0]}", 0, f"{after}{long[1]}{ask}"), drawings[3:4], (), keeps[3:4]),
    )[: 2 + (len(pictures) > 3)]


BATCH = 512
"""Rows of one batch of the engine."""


def cases(row: Row) -> tuple[Case, ...]:
    """A row's cases, and "border": its first picture again, whose rows straddle the end of the first batch, pruned or
    not. The text after it fills over 64 rows: llama.cpp's flash attention on a CPU adds up values in F16 for fewer.
    """
    case = row.cases[0]
    lead, image, tail, *rest = case.segments
    assert isinstance(lead, str)
    assert isinstance(tail, str)
    assert image == 0
    rows = int(staying(row.case_ids(replace(case, segments=(0,))), np.array(case.keep[0])).sum())
    start = BATCH - rows // 2

    def begins_at(text: str) -> int:
        return len(row.case_ids(replace(case, segments=(text,))))

    def taken(i: int) -> int:
        return len(row.tokenizer.encode(f" {filler(i, 1)}")) - 1  # "the" joins the blank before it

    n, at = 1, begins_at(lead + filler(1, 1))
    while (at := at + taken(n + 1)) <= start:
        n += 1
    lead += filler(1, n)
    lead += "z" * (start - begins_at(lead))
    return (*row.cases, replace(case, name="border", segments=(lead, 0, filler(40, 5) + tail, *rest), fed=()))


class Reference(Protocol):
    """A row's model in transformers (torch tensors go in and out of :meth:`decode` as arrays)."""

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Projected rows (n, width) as the prompt has them, ends included, and the tower's attention as
        ``Encoded.tower`` defines it. ``image`` is the picture before any resizing: the family's own processor cuts it.
        """
        ...

    def encode_stock(self, image: RGB) -> Float32:
        """The rows (n, width) that llama.cpp's unrepaired graph gives; those of ``encode`` if it is right."""
        ...

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        """One pass over a prompt with ``rows`` in place of the negative ``ids``.

        positions: (3, n) or (1, n). Returns logits (n, n_vocab) and attention (n_layer, n_head, n, n).
        """
        ...


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        marker: what the chat template writes for a picture.
        spell: (width, height) of a picture -> what stands for it in the prompt.
        tower_layers: blocks whose output is used.
        repairs: repairs that the engine must report.
        seed: of the weights.
        fill: draws the whole model's weights, by Hugging Face names.
    """

    name: str
    text: TextConfig
    tokenizer: Tokenizer
    spell: Callable[[int, int], Spelling]
    tower_layers: int
    repairs: tuple[str, ...]
    cases: tuple[Case, ...]
    seed: int
    fill: Callable[[Weights], None]
    write_mmproj: Callable[[Path, Mapping[str, Float32]], None]
    reference: Callable[[Mapping[str, Float32]], Reference]

    def weights(self) -> dict[str, Float32]:
        """The whole model's weights by Hugging Face names."""
        out = Weights(self.seed)
        self.fill(out)
        return out.tensors

    def reseeded(self, seed: int) -> Row:
        """The same row, files named apart, with other weights: sizes, cases and tokenizer stay."""
        return replace(self, name=f"{self.name}-{seed}", seed=seed)

    def case_ids(self, case: Case) -> Int32:
        """(n,) prompt ids of a case, -1 at image tokens, -2 at ends of rows."""
        ids = [self.tokenizer.id(self.tokenizer.bos)] if self.tokenizer.bos else []
        text = ""
        for segment in case.segments:
            for part in (segment,) if isinstance(segment, str) else self.spelling(case, segment):
                if isinstance(part, str):
                    text += part  # processors spell pictures in the text, and tokenise once
                    continue
                ids += self.tokenizer.encode(text) + part.ids()
                text = ""
        return np.array(ids + self.tokenizer.encode(text), np.int32)

    def spelling(self, case: Case, image: int) -> Spelling:
        """What stands for a picture of a case."""
        drawing = case.images[image]
        parts = self.spell(drawing.width, drawing.height)
        return tuple(p.replace(NUMBER, str(image)) if isinstance(p, str) else p for p in parts)

    def image_tokens(self, case: Case, image: int) -> int:
        """Image tokens of a picture of a case, ends of rows not counted."""
        return sum(part.ids().count(-1) for part in self.spelling(case, image) if isinstance(part, Grid))

    def kept(self, case: Case, half_way: bool = False) -> Int32:
        """Indices, joint over the prompt's pictures, of the image tokens that the pruned run keeps. ``half_way``: of
        these and every second one, for a prompt that is pruned twice.
        """
        out: list[int] = []
        first = 0
        for i in (s for s in case.segments if isinstance(s, int)):
            n = self.image_tokens(case, i)
            out += (first + token for token in range(n) if token in case.keep[i] or (half_way and token % 2 == 0))
            first += n
        return np.array(out, np.int32)


@dataclass(frozen=True)
class ZooModel:
    """A row written to GGUF."""

    row: Row
    model: Path
    mmproj: Path


def staying(ids: Int32, kept: Int32) -> NDArray[np.bool_]:
    """(n,) which rows of a prompt the pruned run has: text, the image tokens ``kept``, and the end of a line (-2) where
    one of its tokens is.
    """
    out, token, line = [], 0, False
    for each in ids:
        stays = bool(each >= 0) or (token in kept if each == -1 else line)
        line = each == -1 and (line or stays)
        token += int(each == -1)
        out.append(stays)
    return np.array(out, bool)


def positions(row: Row, case: Case, ids: Int32) -> Int32:
    """(3, n) positions t, y, x of ``ids`` (prompt and fed tokens) for M-RoPE, (1, n) otherwise.

    M-RoPE (Qwen2-VL, 2409.12191): a picture of R x C tokens that begins at p gives its token (r, c) the place
    (p, p + r, p + c), and text goes on at p + max(R, C).
    """
    if not row.text.mrope:
        return np.arange(len(ids), dtype=np.int32)[None]
    grids = [
        part
        for segment in case.segments
        if isinstance(segment, int)
        for part in row.spelling(case, segment)
        if isinstance(part, Grid)
    ]
    out: list[tuple[int, int, int]] = []
    at, i = 0, 0
    while i < len(ids):
        if ids[i] >= 0:
            out.append((at, at, at))
            at, i = at + 1, i + 1
            continue
        grid = grids.pop(0)
        out += [(at, at + r, at + c) for r in range(grid.rows) for c in range(grid.columns)]
        at, i = at + max(grid.rows, grid.columns), i + grid.rows * grid.columns
    return np.array(out, np.int32).T
