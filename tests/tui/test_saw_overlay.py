"""What is drawn over a picture, against a look at each place by itself."""

from __future__ import annotations

import numpy as np
import pytest

from localvlm.heatmap import covered, heat_colours, heat_shares, owners
from localvlm.tui.picture import Colours, Drawing, Inks, View, cover, kept_share, painted
from localvlm.tui.picture.overlay import DIM, HEAT, LINE, LUMA, SAMPLES

rng = np.random.default_rng(7)


def random_boxes(n: int) -> np.ndarray:
    corners = np.sort(rng.random((n, 2, 2)).astype(np.float32), axis=1).reshape(n, 4)
    corners[0, 2] = corners[0, 0]  # padding
    return corners


def owner_at(x: float, y: float, boxes: np.ndarray, chosen: np.ndarray) -> int:
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    holding = [i for i in chosen.tolist() if boxes[i, 0] <= x < boxes[i, 2] and boxes[i, 1] <= y < boxes[i, 3]]
    return min(holding, key=lambda i: area[i], default=-1)


def test_the_smallest_box_owns_a_place() -> None:
    shape, boxes = (13, 17), random_boxes(20) * np.float32(14)
    chosen = np.array([3, 0, 7, 15, 8, 11], np.int32)
    expected = [[owner_at(x + 0.5, y + 0.5, boxes, chosen) for x in range(shape[1])] for y in range(shape[0])]
    assert np.array_equal(owners(shape, boxes, chosen), expected)
    assert np.array_equal(covered(shape, boxes[chosen]), np.array(expected) >= 0)


def test_boxes_beyond_the_picture_are_cut() -> None:
    boxes = np.array([[-5, -5, 2, 2], [3, 3, 99, 99]], np.float32)
    found = owners((4, 4), boxes, np.arange(2, dtype=np.int32))
    assert found.tolist() == [[0, 0, -1, -1], [0, 0, -1, -1], [-1] * 4, [-1, -1, -1, 1]]
    assert np.array_equal(covered((4, 4), boxes), found >= 0)
    assert owners((2, 2), boxes, np.zeros(0, np.int32)).tolist() == [[-1, -1], [-1, -1]]
    assert not covered((2, 2), boxes[:0]).any()


def test_heat_and_kept_share_are_means_of_places() -> None:
    shape, boxes = (6, 9), random_boxes(12)
    shares, kept = rng.random(12).astype(np.float32), np.array([1, 4, 9], np.int32)
    found, share = cover(shape, boxes, shares), kept_share(shape, boxes, kept)
    for y, x in np.ndindex(shape):
        places = [
            ((x + (i + 0.5) / SAMPLES) / 9, (y + (j + 0.5) / SAMPLES) / 6) for i, j in np.ndindex(SAMPLES, SAMPLES)
        ]
        own = [owner_at(u, v, boxes, np.arange(12)) for u, v in places]
        there = [shares[i] for i in own if i >= 0]
        assert found.there[y, x] == pytest.approx(len(there) / len(own))
        assert found.heat[y, x] == pytest.approx(np.mean(there) if there else 0, abs=1e-5)
        assert share[y, x] == pytest.approx(np.mean([owner_at(u, v, boxes, kept) >= 0 for u, v in places]))


def test_a_raster_that_fits_the_pixels_is_drawn_token_by_token() -> None:
    """Each pixel is exactly its token's heat, or its token's picture."""
    rows, columns, side = 3, 4, 3
    y, x = (v.ravel() for v in np.mgrid[:rows, :columns])
    boxes = np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], axis=1).astype(np.float32)
    picture = rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    scores, kept = rng.random(12).astype(np.float32), np.array([0, 5, 6, 11], np.int32)
    inks = Inks()
    drawing = Drawing(picture)
    drawing.know(boxes, heat_shares(scores), kept)
    token = (np.arange(rows * side) // side)[:, None] * columns + np.arange(columns * side) // side
    shown = np.isin(token, kept)
    beside = np.zeros_like(shown)
    for (v, u), own in np.ndenumerate(shown):
        near = [(v + 1, u), (v - 1, u), (v, u + 1), (v, u - 1)]
        inside = [shown[p] for p in near if 0 <= p[0] < shown.shape[0] and 0 <= p[1] < shown.shape[1]]
        beside[v, u] = not own and any(inside)
    grey = (picture @ LUMA)[..., None]
    hot = HEAT * heat_colours(np.sqrt(scores / scores.max()))[token] + (1 - HEAT) * grey
    for view, bright in ((View.HEAT, hot), (View.KEPT, picture)):
        dim = (1 - DIM) * (bright @ LUMA)[..., None] + DIM * inks.faded(view)
        expected = np.where(shown[..., None], bright, dim)
        expected = np.where(beside[..., None], (1 - LINE) * expected + LINE * np.array(inks.foreground), expected)
        found = drawing.frame((columns * side, rows * side), view, inks).astype(int)
        assert np.abs(found - expected).max() <= 0.51
    assert np.array_equal(drawing.frame((columns * side, rows * side), View.PICTURE, inks), picture)


@pytest.mark.parametrize("inks", [Inks(), Inks((243, 244, 246), (27, 31, 38))])
@pytest.mark.parametrize("shade", [0, 128, 255])
def test_what_was_dropped_is_told_apart_on_any_picture(inks: Inks, shade: int) -> None:
    picture = np.full((4, 8, 3), shade, np.uint8)
    kept = np.zeros((4, 8), np.float32)
    kept[:, :4] = 1
    frame = painted(picture, View.KEPT, None, kept, inks, outlined=True).astype(int)
    assert (frame[:, :4] == shade).all()
    assert np.abs(frame[:, 4] - frame[:, 3]).max() >= 35, "a line"
    assert np.abs(frame[:, 6] - frame[:, 3]).max() >= 15


def test_tiny_tokens_have_no_lines() -> None:
    drawing = Drawing(np.full((20, 20, 3), 200, np.uint8))
    y, x = (v.ravel() / 20 for v in np.mgrid[:20, :20])
    boxes = np.stack([x, y, x + 0.05, y + 0.05], axis=1).astype(np.float32)
    drawing.know(boxes, None, np.arange(0, 400, 2, dtype=np.int32))
    colours = np.unique(drawing.frame((20, 20), View.KEPT).reshape(-1, 3), axis=0)
    assert len(colours) == 2, "kept and dropped, and nothing between"


def test_what_is_not_known_is_not_drawn() -> None:
    picture = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    drawing = Drawing(picture)
    drawing.know(None, np.ones(3, np.float32), np.arange(3, dtype=np.int32))
    assert drawing.kept is None
    assert not drawing.has_heat
    for view in View:
        assert np.array_equal(drawing.frame((10, 10), view), picture)


def test_a_drawing_forgets_what_changed() -> None:
    drawing = Drawing(np.full((8, 8, 3), 90, np.uint8))
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], np.float32)
    frames = []
    for heat, kept in (([0, 1], [0]), ([1, 0], [0]), ([1, 0], [1])):
        drawing.know(boxes, np.array(heat, np.float32), np.array(kept, np.int32))
        frames.append(drawing.frame((8, 8), View.HEAT).tobytes())
    assert len(set(frames)) == 3


def test_without_colours_dropped_tokens_are_blank_and_heat_has_shades() -> None:
    drawing = Drawing(np.full((40, 40, 3), 255, np.uint8))
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]], np.float32)
    drawing.know(boxes, np.array([0, 1, 0.5, 1], np.float32), np.array([0, 1, 2], np.int32))
    lines = [s.text for s in drawing.strips(8, 4, View.HEAT, Inks(), Colours.NONE)]
    assert lines == ["░░░░████"] * 2 + ["▒▒▒▒    "] * 2
    dots = [s.text for s in drawing.strips(8, 4, View.KEPT, Inks(), Colours.NONE)]
    assert dots == ["⣿" * 8] * 2 + ["⣿⣿⣿⣿    "] * 2
    whole = [s.text for s in drawing.strips(8, 4, View.PICTURE, Inks(), Colours.NONE)]
    assert whole == ["⣿" * 8] * 4
