"""The control ``downscale``: sizes of smaller pictures, and rows averaged over areas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.engine.api import ImageLayout
from localvlm.evaluation.downscale import area_pooled, grid_within, pooled, shrunk, what_was_done
from localvlm.pruning import Kept


def layout(n: int) -> ImageLayout:
    return ImageLayout(n, np.zeros((n, 4), np.float32), None, n)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1))
def test_a_smaller_picture_has_most_tokens_within_the_budget(width, height, keep):
    def patches(w: int, h: int) -> ImageLayout:
        return layout(max(1, round(w / 28)) * max(1, round(h / 28)))

    size = shrunk(patches, (width, height), keep)
    tried = {(max(1, width * k // 64), max(1, height * k // 64)) for k in range(1, 65)}
    budget = max(1, round(keep * patches(width, height).n_tokens))
    counts = {at: patches(*at).n_tokens for at in tried}
    assert size in tried
    within = [n for n in counts.values() if n <= budget]
    assert counts[size] == (max(within) if within else min(counts.values()))


def test_a_tower_of_one_size_gets_the_picture_as_it_is():
    assert shrunk(lambda w, h: layout(576), (640, 480), 0.35) == (640, 480)
    tiles = {True: 5 * 64, False: 64}  # four tiles and an overview from some size on
    assert shrunk(lambda w, h: layout(tiles[w > 400]), (640, 480), 0.35) == (400, 300)
    assert shrunk(lambda w, h: layout(tiles[w > 400]), (640, 480), 0.05) == (400, 300)


# ---- areas


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_a_cell_is_the_mean_of_what_it_covers(height, width, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    rows = np.random.default_rng(height * width).normal(size=(height, width, 3)).astype(np.float32)
    fine = rows.repeat(h, axis=0).repeat(w, axis=1)  # in which every cell is height x width whole places
    want = fine.reshape(h, height, w, width, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(area_pooled(rows, (h, w)), want, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1700))
def test_the_coarser_raster_is_the_largest_of_its_shape(rows, columns, k):
    found = grid_within(rows, columns, k)
    assert found[0] <= rows and found[1] <= columns and found[0] * found[1] <= k  # noqa: PT018
    short, long = (1, 0) if rows > columns else (0, 1)
    ratio = (rows, columns)[long] / (rows, columns)[short]

    def alike(grid: tuple[int, int]) -> bool:
        return grid[short] == 1 or abs(grid[long] - grid[short] * ratio) <= 1

    assert alike(found)
    every = [(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if h * w <= k]
    longest = math.floor(ratio) + 1  # of one place across
    others = [g for g in every if alike(g) and (g[short] > 1 or g[long] <= longest)]
    assert found[0] * found[1] == max(h * w for h, w in others)


def test_a_square_keeps_nearly_as_many_as_others_may():
    assert [grid_within(24, 24, k) for k in (576, 369, 202, 52)] == [(24, 24), (19, 19), (14, 14), (7, 7)]
    assert grid_within(12, 12, 13) == (3, 4)


def boxes(rows: int, columns: int, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    x, y = np.linspace(x0, x1, columns + 1), np.linspace(y0, y1, rows + 1)
    cells = [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)]
    return np.clip(cells, 0, (60, 30, 60, 30)).astype(np.float32)


def test_cells_stand_at_their_centres_and_padding_is_left_out():
    padded = ImageLayout(36, boxes(6, 6, 0, -15, 60, 45), (6, 6), 36)  # rows 0, 1 (in part), 4 (in part), 5
    features = np.arange(36, dtype=np.float32)[:, None].repeat(2, axis=1)
    kept = pooled(padded, features, 4)
    assert kept is not None
    shown = [i for i, (a, b, c, d) in enumerate(padded.boxes) if c > a and d > b]
    assert shown == list(range(6, 30))
    # 4 x 6 shown tokens: cells of 2 x 3 or of 4 x 1.5; the largest raster of their shape in 4 is 2 x 2
    np.testing.assert_array_equal(kept.index, [13, 16, 25, 28])
    quarters = features.reshape(6, 6, 2)[1:5].reshape(2, 2, 2, 3, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(kept.rows, quarters.reshape(4, 2))


def test_each_tile_is_pooled_by_itself_wherever_its_tokens_stand():
    halves = [boxes(4, 4, 0, 0, 30, 30), boxes(4, 4, 30, 0, 60, 30)]
    order = np.arange(32).reshape(2, 4, 4).transpose(1, 0, 2).reshape(-1)  # row by row over both
    tiles = (order // 16).astype(np.int32)
    layout = ImageLayout(32, np.concatenate(halves)[order], None, 32, 2, tiles)
    features = tiles[:, None].astype(np.float32)
    kept = pooled(layout, features, 8)
    assert kept is not None
    assert (np.diff(kept.index) > 0).all()
    np.testing.assert_array_equal(tiles[kept.index], [0, 0, 1, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(kept.rows[:, 0], tiles[kept.index])


@pytest.mark.parametrize("places", [None, np.array([[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 2, 2]], np.float32)])
def test_where_there_is_no_raster_nothing_is_pooled(places):
    assert pooled(ImageLayout(3, places, None, 3), np.ones((3, 2), np.float32), 2) is None


def test_what_was_done_is_told():
    one, tiled, small = layout(64), ImageLayout(320, None, None, 320, 5), layout(16)
    kept = Kept(np.zeros(1, np.int32))
    assert what_was_done([one], [one], [None]) == []
    assert what_was_done([one], [one], [kept]) == ["pooled"]
    assert what_was_done([one], [small], [None]) == ["smaller picture"]
    assert what_was_done([tiled], [one], [kept]) == ["fewer tiles", "pooled"]
    assert what_was_done([tiled, one], [one, one], [None, kept]) == ["fewer tiles", "pooled"]
