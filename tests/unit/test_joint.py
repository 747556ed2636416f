"""Joint ranking: a floor for each picture, and tiles that are worth their price."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.pruning import Inputs
from localvlm.pruning.joint import FLOOR, best, floors


def inputs(counts: tuple[int, ...], scores: list[float], tiles: list[int] | None = None, price: float = 0) -> Inputs:
    n = sum(counts)
    return Inputs(
        n,
        np.arange(n, dtype=np.int32),
        (None,) * len(counts),
        counts,
        np.array(scores, np.float32),
        tiles=None if tiles is None else np.array(tiles, np.int32),
        tile_price=price,
    )


many = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@given(counts=many, data=st.data())
def test_every_picture_has_its_floor(counts: list[int], data) -> None:
    n = sum(counts)
    k = data.draw(st.integers(1, n))
    scores = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    given_inputs = inputs(tuple(counts), scores)
    least, kept = floors(given_inputs, k), best(given_inputs, k)
    assert len(kept) == k
    picture = np.repeat(np.arange(len(counts)), counts)
    assert (np.bincount(picture[kept], minlength=len(counts)) >= least).all()
    if len(counts) > 1 and k >= len(counts):
        assert (least >= 1).all()
        assert (least >= np.floor(FLOOR * (k - len(counts)) * np.array(counts) / n)).all()
    else:
        assert not least.any()


def test_a_floor_takes_the_best_of_its_picture_and_the_rest_is_joint() -> None:
    first, second = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.01, 0.03, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0]
    given_inputs = inputs((8, 8), first + second)
    assert floors(given_inputs, 8).tolist() == [1, 1]
    assert best(given_inputs, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert floors(given_inputs, 16).tolist() == [2, 2]
    assert best(given_inputs, 1).tolist() == [0]
    assert best(inputs((8, 8), second + first), 8).tolist() == [1, *range(8, 15)]


def test_a_picture_wholly_on_padding_has_no_floor() -> None:
    given_inputs = inputs((2, 2, 2), [1, 1, 1, 1, 1, 1])
    shown = Inputs(6, np.array([0, 1, 4, 5], np.int32), given_inputs.grids, (2, 2, 2), given_inputs.saliency)
    assert floors(shown, 3).tolist() == [1, 0, 1]
    assert set(best(shown, 3).tolist()) <= {0, 1, 4, 5}


def test_a_tile_that_is_not_worth_its_price_is_left_out() -> None:
    """Without tile 1 three tokens and two more for its price hold 9 + 4 + 3 + 2 + 1 of tile 0; with it 9 + 4 + 5."""
    scores, tiles = [9.0, 4, 3, 2, 1, 5, 0, 0, 0, 0], [0] * 5 + [1] * 5
    for price, kept in ((0, [0, 1, 5]), (0.4, [0, 1, 5]), (1, [0, 1, 5]), (2, [0, 1, 2]), (50, [0, 1, 2])):
        assert best(inputs((10,), scores, tiles, price), 3).tolist() == kept, price


def test_a_tile_that_costs_nothing_stays() -> None:
    scores, tiles = [9.0, 4, 3, 2, 1, 5, 0, 0, 0, 0], [0] * 5 + [1] * 5
    for opened, kept in (({1}, [0, 1, 5]), ({0}, [0, 1, 2]), ({0, 1}, [0, 1, 5])):
        given_inputs = replace(inputs((10,), scores, tiles, 50), opened=frozenset(opened))
        assert best(given_inputs, 3).tolist() == kept, opened


def test_no_tile_is_left_out_that_the_budget_needs() -> None:
    scores, tiles = [9.0, 8, 7, 1, 1, 1], [0, 0, 0, 1, 1, 1]
    assert best(inputs((6,), scores, tiles, 1000), 4).tolist() == [0, 1, 2, 3]
    two = inputs((3, 3), scores, tiles, 1000)
    assert set(best(two, 3).tolist()) & {3, 4, 5}, "the floor of the second picture"


def test_no_tile_is_opened_for_the_price_of_another() -> None:
    """Tokens come from tiles that the best k are in; tile 2 would have to be encoded too."""
    scores, tiles = [9.0, 3, 1, 3.1, 2.9, 2.8], [0, 0, 0, 1, 2, 2]
    assert best(inputs((6,), scores, tiles, 0), 2).tolist() == [0, 3]
    assert best(inputs((6,), scores, tiles, 1), 2).tolist() == [0, 1]


@given(seed=st.integers(0, 2**31), price=st.integers(0, 8), k=st.integers(1, 12), n_tiles=st.integers(1, 4))
def test_each_tile_that_stays_is_worth_its_price(seed: int, price: int, k: int, n_tiles: int) -> None:
    """By hand: of the tiles in use none can be left out and more be kept at the same cost; k are kept."""
    rng = np.random.default_rng(seed)
    tiles = rng.permutation(np.arange(16) % n_tiles)
    scores = np.round(rng.random(16) ** 4, 3)
    kept = best(inputs((16,), scores.tolist(), tiles.tolist(), price), k)
    assert len(kept) == k
    used = set(tiles[kept].tolist())
    free = best(inputs((16,), scores.tolist(), tiles.tolist()), k)
    assert used <= set(tiles[free].tolist())
    if not price:
        assert kept.tolist() == free.tolist()
        return
    for rest in combinations(sorted(used), len(used) - 1):
        there = np.sort(scores[np.isin(tiles, rest)])[::-1]
        if rest and len(there) >= k:
            assert there[: k + price].sum() <= scores[kept].sum() + 1e-6


@pytest.mark.parametrize("price", [0.0, 3.0])
def test_ties_go_to_the_earlier_token(price: float) -> None:
    assert best(inputs((6,), [1] * 6, [0] * 6, price), 3).tolist() == [0, 1, 2]
