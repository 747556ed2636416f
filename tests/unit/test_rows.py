"""Prompts as rows: positions, classes and image indices, told again token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localvlm.engine.api import ImageLayout
from localvlm.engine.native import ROW_LAST, ROW_PROMPT
from localvlm.engine.rows import Placed, lay_rows
from localvlm.engine.tower import Picture, Piece


def picture(
    shapes: list[tuple[int, int]], mrope: bool, wrap: tuple[int, ...] = (), blank: frozenset[int] = frozenset()
) -> Picture:
    """One piece per (rows, columns), with ``wrap`` tokens before, between and after the pieces; the rows numbered in
    ``blank`` show nothing."""
    pieces: list[Piece] = [Piece(ids=wrap)] if wrap else []
    first = tokens = 0
    for rows, columns in shapes:
        n = rows * columns
        y, x = np.divmod(np.arange(n), columns)
        relative = np.stack([0 * y, y, x] if mrope else [np.arange(n)] * 3, axis=1).astype(np.int32)
        shows = np.array([first + i not in blank for i in range(n)])
        token = np.where(shows, tokens + np.cumsum(shows) - 1, -1).astype(np.int32)
        pieces.append(Piece((), first, token, relative, max(rows, columns) if mrope else n))
        first, tokens = first + n, tokens + int(shows.sum())
        if wrap:
            pieces.append(Piece(ids=wrap))
    n_pos = sum(p.n_pos or len(p.ids) for p in pieces)
    return Picture(ImageLayout(tokens, None, None, n_pos), tuple(pieces))


def by_hand(parts: list) -> dict[str, list]:
    """The unpruned prompt, a token at a time; each row says whether it is kept."""
    rows: list[dict] = []
    position = image = 0

    def text(token: int) -> None:
        nonlocal position
        rows.append({"id": token, "at": (position,) * 3, "image": -1, "local": -1, "kept": True})
        position += 1

    for part in parts:
        if not isinstance(part, Placed):
            for token in part:
                text(token)
            continue
        local = shown = 0
        for piece in part.picture.pieces:
            line = False
            for token in piece.ids:
                text(token)
            for i in range(piece.n):
                place = tuple(int(v) + position for v in piece.relative[i])
                shows = piece.token[i] >= 0
                kept = part.keep is None or shown in set(part.keep.tolist())
                if not shows:  # ends a line, and is there where something of it is
                    kept = part.keep is None or len(part.keep) == part.picture.layout.n_tokens or line
                line = (line or kept) if shows else False
                rows.append(
                    {"id": -2 + shows, "at": place, "image": image if shows else -1, "local": local, "kept": kept}
                )
                image, shown, local = image + shows, shown + shows, local + 1
            position += piece.n_pos
    last_image = max((i for i, row in enumerate(rows) if row["id"] < 0), default=len(rows))
    for i, row in enumerate(rows):
        row["class"] = ROW_PROMPT * (i > last_image) | ROW_LAST * (i > last_image and i == len(rows) - 1)
    kept = [row for row in rows if row["kept"]]
    out = {key: [row[key] for row in kept] for key in ("id", "at", "image", "local", "class")}
    return {**out, "all": [row["id"] for row in rows], "n_image": image, "next": position}


def agree(parts: list) -> None:
    want, got = by_hand(parts), lay_rows(parts)
    assert got.ids.tolist() == want["id"]
    assert [tuple(p) for p in got.positions.tolist()] == want["at"]
    assert got.image.tolist() == want["image"]
    assert got.local.tolist() == want["local"]
    assert got.classes.tolist() == want["class"]
    assert got.all_ids.tolist() == want["all"]
    assert (got.n_image, got.next_position) == (want["n_image"], want["next"])
    assert (got.n, got.n_kept) == (len(want["id"]), sum(i >= 0 for i in want["image"]))
    for array in (got.ids, got.positions, got.image, got.local, got.all_ids):
        assert array.dtype == np.int32
    # runs cover all rows once, in order, each of one kind
    assert [r.start for r in got.runs] == [0, *[r.stop for r in got.runs]][: len(got.runs)]
    assert not got.runs or got.runs[-1].stop == got.n
    for run in got.runs:
        assert run.stop > run.start
        assert {run.picture is not None} == {bool(i >= 0) for i in got.local[run.start : run.stop]}


def test_compact_positions_have_no_gaps() -> None:
    some = Placed(picture([(2, 3)], mrope=False, wrap=(7,)), np.array([0, 4], np.int32))
    true = lay_rows([[1, 2], some, [3]])
    compact = true.compact()
    assert true.positions[:, 0].tolist() == [0, 1, 2, 3, 7, 9, 10]
    assert compact.positions.tolist() == [[i] * 3 for i in range(7)]
    assert (true.next_position, compact.next_position) == (11, 7)
    assert np.array_equal(true.ids, compact.ids)
    assert compact.positions.dtype == np.int32


texts = st.lists(st.integers(0, 99), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_any_prompt(data, mrope: bool) -> None:
    parts: list = []
    for _ in range(data.draw(st.integers(1, 3))):
        parts.append(data.draw(texts))
        wrap = tuple(data.draw(st.lists(st.integers(100, 105), max_size=2)))
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2))
        n_rows = sum(r * c for r, c in shapes)
        placed = picture(shapes, mrope, wrap, data.draw(st.frozensets(st.integers(1, n_rows))))
        chosen = data.draw(st.none() | st.sets(st.integers(0, placed.layout.n_tokens - 1)))
        parts.append(Placed(placed, None if chosen is None else np.array(sorted(chosen), np.int32)))
    parts.append(data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4)))
    agree(parts)


@pytest.mark.parametrize("mrope", [False, True])
def test_pruned_to_nothing_text_stays_where_it_was(mrope: bool) -> None:
    none = np.array([], np.int32)
    parts = [[1, 2], Placed(picture([(3, 5)], mrope, (7,)), none), [3]]
    agree(parts)
    rows = lay_rows(parts)
    assert rows.ids.tolist() == [1, 2, 7, 7, 3]
    assert rows.positions[-1, 0] == 2 + 1 + (5 if mrope else 15) + 1
    assert rows.classes.tolist() == [0, 0, 0, ROW_PROMPT, ROW_PROMPT | ROW_LAST]


def test_mrope_text_goes_on_after_the_longer_side() -> None:
    """Qwen2-VL (2409.12191): a 2 x 4 picture at 3 takes 3 .. 6 along x, so text goes on at 7."""
    rows = lay_rows([[1, 2, 3], Placed(picture([(2, 4)], True), None), [4]])
    assert rows.positions[3:11].tolist() == [[3, 3 + y, 3 + x] for y in range(2) for x in range(4)]
    assert rows.positions[11].tolist() == [7, 7, 7]
    assert rows.next_position == 8


def test_text_alone_and_pictures_last() -> None:
    agree([[5, 6, 7]])
    agree([[], [5], []])
    agree([[5], Placed(picture([(2, 2)], False), np.array([1, 3], np.int32))])


def test_text_between_pictures_is_no_prompt_row() -> None:
    rows = lay_rows([[1], Placed(picture([(1, 2)], False), None), [2, 3], Placed(picture([(1, 1)], False), None), [4]])
    assert rows.classes.tolist() == [0, 0, 0, 0, 0, 0, ROW_PROMPT | ROW_LAST]


@pytest.mark.parametrize("keep", [[], [7], list(range(12))])
def test_text_between_tiles_always_stays(keep: list[int]) -> None:
    """A picture of three tiles with control tokens around each, pruned to nothing, to one token, and not at all."""
    rows = lay_rows([[1], Placed(picture([(2, 2)] * 3, False, (8, 9)), np.array(keep, np.int32)), [2]])
    assert rows.ids[rows.ids >= 0].tolist() == [1, *[8, 9] * 4, 2]
    assert rows.image[rows.ids < 0].tolist() == keep
    assert rows.positions[rows.ids >= 0, 0].tolist() == [0, 1, 2, 7, 8, 13, 14, 19, 20, 21]
    assert rows.classes[rows.ids >= 0].tolist() == [0] * 7 + [ROW_PROMPT] * 2 + [ROW_PROMPT | ROW_LAST]


def test_an_end_comes_with_the_first_token_of_its_line() -> None:
    """Three lines of two tokens and an end each; tokens come in the first place, and then more of them."""
    lines = picture([(3, 3)], False, blank=frozenset({2, 5, 8}))

    def some(*tokens: int, again: int | None = None) -> Placed:
        return Placed(lines, np.array(tokens, np.int32), again=again)

    rows = lay_rows([[1], some(2), [9], some(3, 4, again=0), [9]])
    assert rows.local.tolist() == [-1, 3, 5, -1, 4, 6, 8, -1]
    assert rows.ids.tolist() == [1, -1, -2, 9, -1, -1, -2, 9]
    assert rows.positions[:, 0].tolist() == [0, 4, 6, 10, 5, 7, 9, 11]
    whole = lay_rows([[1], Placed(lines, None), [9]])
    for kept in ([], [2], [0, 5]):
        pruned, now = whole.only(whole.staying(np.array(kept, np.int32))), lay_rows([[1], some(*kept), [9]])
        assert (pruned.keys == now.keys).all()
