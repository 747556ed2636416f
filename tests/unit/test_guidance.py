"""Scores per image token: the aggregation formulas, and moving mass between token grids."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.engine.api import Attention
from localvlm.engine.families.base import Tile
from localvlm.guidance import AGGREGATIONS, carried, resample, spread, stand_ins

SIZE = 24
"""Side of the picture that the brute force counts pixels of."""


def edges(inside: bool) -> st.SearchStrategy[list[int]]:
    """Sorted whole-pixel borders of a raster: over the whole picture, or of any part of it."""
    cuts = st.lists(st.integers(0, SIZE), min_size=2, max_size=7).map(sorted)
    return cuts if inside else cuts.map(lambda c: sorted([0, *c, SIZE]))


def raster(xs: list[int], ys: list[int]) -> np.ndarray:
    boxes = [(x0, y0, x1, y1) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)]
    return np.array(boxes, np.float32).reshape(-1, 4)


def by_pixels(scores: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Spreads every source token over its pixels, splits each pixel among the target tokens on it, and counts."""
    canvas = np.zeros((SIZE, SIZE))
    for score, (x0, y0, x1, y1) in zip(scores, source.astype(int), strict=True):
        pixels = canvas[y0:y1, x0:x1]
        if pixels.size:
            pixels += score / pixels.size
    layers = np.zeros((SIZE, SIZE))
    for x0, y0, x1, y1 in target.astype(int):
        layers[y0:y1, x0:x1] += 1
    canvas /= np.maximum(layers, 1)
    return np.array([canvas[y0:y1, x0:x1].sum() for x0, y0, x1, y1 in target.astype(int)])


@given(edges(True), edges(True), edges(False), edges(False), st.integers(0, 2**31))
def test_resample_counts_pixels(sx, sy, tx, ty, seed) -> None:
    source, target = raster(sx, sy), raster(tx, ty)
    scores = np.random.default_rng(seed).random(len(source)).astype(np.float32)
    got = resample(scores, source, target)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, by_pixels(scores, source, target), rtol=1e-5, atol=1e-6)


def boxes(least: int) -> st.SearchStrategy[np.ndarray]:
    """Any boxes: apart, upon one another, empty."""
    side = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
    box = st.tuples(side, side).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1]))
    return st.lists(box, min_size=least, max_size=12).map(lambda b: np.array(b, np.float32).reshape(-1, 4))


@given(boxes(1), boxes(1), st.integers(0, 2**31))
def test_resample_counts_pixels_of_boxes_that_overlap(source, target, seed) -> None:
    if np.array_equal(source, target):
        return
    scores = np.random.default_rng(seed).random(len(source)).astype(np.float32)
    np.testing.assert_allclose(
        resample(scores, source, target), by_pixels(scores, source, target), rtol=1e-5, atol=1e-6
    )


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_the_most_similar_token_that_was_seen_stands_for_each(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, seen = rng.normal(size=(12, 5)).astype(np.float32), np.sort(rng.permutation(12)[:k]).astype(np.int32)
    features[3] = 0
    of, share = stand_ins(features, seen)
    for i, row in enumerate(features.astype(float)):
        cosines = [row @ features[j] / max(np.linalg.norm(row) * np.linalg.norm(features[j]), 1e-9) for j in seen]
        if i in seen:
            assert (of[i], share[i]) == (i, 1)
        else:
            assert share[i] == pytest.approx(max(0, *cosines, 0), abs=1e-5)
            assert cosines[seen.tolist().index(of[i])] == pytest.approx(max(cosines), abs=1e-5)


def test_attention_is_carried_to_tokens_that_were_not_seen() -> None:
    rng = np.random.default_rng(0)
    got = [rng.random((2, 3, 4)).astype(np.float32) for _ in range(9)]
    a = Attention(*got[:3], weighted=(got[3], got[4], got[5]), maximum=(got[6], got[7], got[8]), rows=(2, 1))
    of, share = np.array([1, 1, 3, 3], np.int32), np.array([0.5, 1, 0.25, 1], np.float32)
    wide = carried(a, of, share)
    for name, scores in AGGREGATIONS.items():
        np.testing.assert_allclose(scores(wide), scores(a)[of] * share, rtol=1e-6, err_msg=name)
    assert wide.rows == a.rows


def tiled(width: int, height: int, columns: int, rows: int) -> np.ndarray:
    """Boxes of an overview and of tiles, 4 x 4 tokens each."""
    tile, picture = 56, (width, height)
    size = (columns * tile, rows * tile)
    crops = [(x * tile, y * tile) for y in range(rows) for x in range(columns)]
    found = [Tile((size,), (x, y, x + tile, y + tile), 4, 4).boxes(*picture) for x, y in crops]
    return np.concatenate([*found, Tile(((tile, tile),), (0, 0, tile, tile), 4, 4).boxes(*picture)])


@pytest.mark.parametrize(("width", "height"), [(640, 480), (479, 641), (97, 1000)])
def test_a_place_seen_twice_counts_once(width: int, height: int) -> None:
    """Between one raster and overview with tiles, both ways: each quarter keeps its mass, half of it in tiles."""
    plain, both = Tile(((868, 476),), (0, 0, 868, 476), 16, 32).boxes(width, height), tiled(width, height, 2, 4)
    middle = np.array([width / 2, height / 2])
    for source, target in ((plain, both), (both, plain)):
        scores = np.random.default_rng(1).random(len(source)).astype(np.float32)
        found = resample(scores, source, target)
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            low = middle * corner
            quarter = np.array([[*low, *(low + middle)]], np.float32)
            want = resample(scores, source, quarter)
            np.testing.assert_allclose(resample(found, target, quarter), want, rtol=1e-4)
    to_tiles = resample(np.ones(len(plain), np.float32), plain, both)
    np.testing.assert_allclose(to_tiles[:-16].sum(), to_tiles[-16:].sum(), rtol=1e-4)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (97, 1000), (1, 1), (336, 336)])
def test_resample_conserves_mass_between_real_grids(width: int, height: int) -> None:
    """A padded 24x24 raster to another tower's, and back: no mass appears or is lost."""
    long = max(width, height)
    canvas = (long, long, (long - width) // 2, (long - height) // 2)
    source = Tile(((336, 336),), (0, 0, 336, 336), 24, 24, canvas).boxes(width, height)
    target = Tile(((868, 476),), (0, 0, 868, 476), 17, 31).boxes(width, height)
    area = (source[:, 2] - source[:, 0]) * (source[:, 3] - source[:, 1])
    scores = np.where(area > 0, np.random.default_rng(1).random(len(source)), 0).astype(np.float32)
    there = resample(scores, source, target)
    back = resample(there, target, source)
    assert there.sum() == pytest.approx(scores.sum(), rel=1e-4)
    assert back.sum() == pytest.approx(scores.sum(), rel=1e-4)
    assert (there >= 0).all()


def test_resample_drops_what_lies_on_padding() -> None:
    source = np.array([[0, 0, 2, 2], [2, 0, 2, 2]], np.float32)
    target = np.array([[0, 0, 1, 2], [1, 0, 2, 2], [2, 0, 2, 2]], np.float32)
    np.testing.assert_array_equal(resample(np.array([4, 9], np.float32), source, target), [2, 2, 0])


def test_same_grid_is_left_alone() -> None:
    boxes = Tile((), (0, 0, 50, 40), 4, 4).boxes(50, 40)
    scores = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(resample(scores, boxes, boxes.copy()), scores)


def spread_by_pixels(scores: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The mean density of the source over each box, times the mean size of a box."""
    canvas = np.zeros((SIZE, SIZE))
    for score, (x0, y0, x1, y1) in zip(scores, source.astype(int), strict=True):
        canvas[y0:y1, x0:x1] += score / max((y1 - y0) * (x1 - x0), 1)
    cut = [canvas[y0:y1, x0:x1] for x0, y0, x1, y1 in target.astype(int)]
    mean = np.mean([c.size for c in cut if c.size] or [0])
    return np.array([c.mean() * mean if c.size else 0 for c in cut])


@given(boxes(1), boxes(1), st.integers(0, 2**31))
def test_spread_is_density_over_any_boxes(source, target, seed) -> None:
    if np.array_equal(source, target):
        return
    scores = np.random.default_rng(seed).random(len(source)).astype(np.float32)
    got = spread(scores, source, target)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, spread_by_pixels(scores, source, target), rtol=1e-5, atol=1e-6)


def test_overview_and_tiles_rank_alike_where_the_guide_cannot_tell_them_apart() -> None:
    """A guide that sees the overview alone scores each of its tokens and the four below it the same; a finer guide's
    peak puts the tile's token first.
    """
    overview, both = tiled(64, 64, 1, 1)[:16], tiled(64, 64, 2, 2)
    scores = np.random.default_rng(1).permutation(16).astype(np.float32)
    found = spread(scores, overview, both)
    order = np.argsort(-found, kind="stable")
    for i, rank in enumerate(np.argsort(-scores)):
        x0, y0, x1, y1 = overview[rank]
        for box in both[order[5 * i : 5 * i + 5]]:
            assert (box[:2] >= (x0, y0)).all()
            assert (box[2:] <= (x1, y1)).all()
    fine = both[:64]
    peak = np.zeros(64, np.float32)
    peak[37] = 1
    assert spread(peak, fine, both).argmax() == 37
    assert resample(peak, fine, both).argmax() == 37
    everywhere = np.ones(64, np.float32)
    assert resample(everywhere, fine, both).argmax() >= 64, "by mass the overview comes first"
    np.testing.assert_allclose(spread(everywhere, fine, both), spread(everywhere, fine, both)[0], rtol=1e-5)


def test_spread_keeps_one_raster_s_scores_in_proportion() -> None:
    """Between two rasters, both without padding, it is mass that ranks."""
    source, target = Tile((), (0, 0, 60, 40), 4, 4).boxes(60, 40), Tile((), (0, 0, 60, 40), 5, 3).boxes(60, 40)
    scores = np.random.default_rng(2).random(16).astype(np.float32)
    np.testing.assert_allclose(spread(scores, source, target), resample(scores, source, target), rtol=1e-4)
    np.testing.assert_array_equal(spread(scores, source, source.copy()), scores)


def attention(seed: int = 3) -> Attention:
    draw = np.random.default_rng(seed)
    three = [tuple(draw.random((2, 3, 5)).astype(np.float32) for _ in range(3)) for _ in range(3)]
    return Attention(*three[0], weighted=three[1], maximum=three[2])


def loops(pick) -> np.ndarray:
    """pick(layer, head, token) -> list of values, reduced by its own name."""
    return np.array([[pick(i, h, t) for i in range(2) for h in range(3)] for t in range(5)])


def test_sum_adds_prompt_and_generated_rows() -> None:
    a = attention()
    want = loops(lambda i, h, t: a.prompt[i, h, t] + a.generated[i, h, t]).sum(axis=1)
    np.testing.assert_allclose(AGGREGATIONS["sum"](a), want, rtol=1e-6)


def test_last_takes_the_last_prompt_row_alone() -> None:
    a = attention()
    np.testing.assert_allclose(AGGREGATIONS["last"](a), loops(lambda i, h, t: a.last[i, h, t]).sum(axis=1), rtol=1e-6)


def test_selective_adds_weighted_rows() -> None:
    a = attention()
    assert a.weighted is not None
    prompt, generated, _ = a.weighted
    want = loops(lambda i, h, t: prompt[i, h, t] + generated[i, h, t]).sum(axis=1)
    np.testing.assert_allclose(AGGREGATIONS["selective"](a), want, rtol=1e-6)


def test_max_takes_the_largest_of_all_rows() -> None:
    a = attention()
    assert a.maximum is not None
    prompt, generated, _ = a.maximum
    want = loops(lambda i, h, t: max(prompt[i, h, t], generated[i, h, t])).max(axis=1)
    np.testing.assert_array_equal(AGGREGATIONS["max"](a), want)


@pytest.mark.parametrize("name", ["selective", "max"])
def test_reductions_that_were_not_recorded_are_refused(name: str) -> None:
    zeros = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="reductions"):
        AGGREGATIONS[name](Attention(zeros, zeros, zeros))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_scores_are_float32_per_token(name: str) -> None:
    scores = AGGREGATIONS[name](attention())
    assert (scores.shape, scores.dtype) == ((5,), np.float32)
