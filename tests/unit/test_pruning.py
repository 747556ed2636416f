"""Pruning methods: how many, which, and in what order."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from localvlm.errors import UsageError
from localvlm.pruning import METHODS, PRESETS, Inputs, Tokens, budget, mean_kept, method_named, preset_named
from localvlm.pruning.base import AUTO_BOUNDS, AUTO_SHARE, top
from localvlm.pruning.controls import lattice
from localvlm.pruning.kinds import FLOORS, OTHER, floor_of, kind_of

UNTRAINED = [m for m in METHODS.values() if m.shapes is None]
CHOOSING = [m for m in UNTRAINED if m.name != "none"]
"""All of them but the one that keeps everything."""


def inputs(shapes: list[tuple[int, int]], padding: int = 0, seed: int = 0, raster: bool = True) -> Inputs:
    """Pictures of (rows, columns) tokens, the first and last ``padding`` rows of each on padding, random scores."""
    counts = tuple(r * c for r, c in shapes)
    rng = np.random.default_rng(seed + 1)
    shown = [np.repeat((np.arange(r) >= padding) & (np.arange(r) < r - padding), c) for r, c in shapes]
    return Inputs(
        n=sum(counts),
        candidates=np.flatnonzero(np.concatenate(shown)).astype(np.int32),
        grids=tuple(shapes) if raster else (None,) * len(shapes),
        counts=counts,
        saliency=np.random.default_rng(seed).random(sum(counts)).astype(np.float32),
        seed=seed,
        features=rng.normal(size=(sum(counts), 8)).astype(np.float32),
        tower=rng.random((4, sum(counts))).astype(np.float32),
        text=rng.normal(size=(3, 8)).astype(np.float32),
    )


shapes = st.lists(st.tuples(st.integers(3, 9), st.integers(1, 9)), min_size=1, max_size=3)


@pytest.mark.parametrize("method", CHOOSING, ids=lambda m: m.name)
@given(shapes=shapes, padding=st.integers(0, 1), seed=st.integers(0, 99), raster=st.booleans(), data=st.data())
def test_exactly_k_sorted_unique_candidates(method, shapes, padding, seed, raster, data) -> None:
    given_inputs = inputs(shapes, padding, seed, raster)
    k = data.draw(st.integers(1, len(given_inputs.candidates)))
    kept = method.select(given_inputs, k)
    assert kept.dtype == np.int32
    assert len(kept) == k
    assert (np.diff(kept) > 0).all()
    assert np.isin(kept, given_inputs.candidates).all()


@pytest.mark.parametrize("method", UNTRAINED, ids=lambda m: m.name)
def test_all_of_them_is_all_of_them(method) -> None:
    given_inputs = inputs([(4, 4), (3, 5)])
    np.testing.assert_array_equal(method.select(given_inputs, given_inputs.n), np.arange(given_inputs.n))


@pytest.mark.parametrize("name", ["sgl", "sgl+"])
def test_the_best_scores_are_kept(name: str) -> None:
    given_inputs = inputs([(9, 4)], padding=1, seed=4)
    ranked = sorted(given_inputs.candidates, key=lambda i: -given_inputs.saliency[i])
    for k in range(1, len(ranked) + 1):
        assert list(METHODS[name].select(given_inputs, k)) == sorted(ranked[:k])


def test_padding_is_never_kept_however_well_it_scores() -> None:
    saliency = np.array([9, 1, 9, 2], np.float32)
    assert list(top(saliency, np.array([1, 3], np.int32), 2)) == [1, 3]


def test_ties_go_to_the_earlier_token() -> None:
    saliency = np.array([1, 5, 1, 5, 1, 5], np.float32)
    everywhere = np.arange(6, dtype=np.int32)
    assert list(top(saliency, everywhere, 2)) == [1, 3]
    assert list(top(saliency, everywhere, 4)) == [0, 1, 3, 5]
    assert list(top(np.zeros(6, np.float32), everywhere, 3)) == [0, 1, 2]


def test_random_follows_its_seed_and_is_even() -> None:
    method = METHODS["random"]
    drawn = [method.select(inputs([(5, 5)], seed=s), 5) for s in range(400)]
    np.testing.assert_array_equal(method.select(inputs([(5, 5)], seed=7), 5), drawn[7])
    counts = np.bincount(np.concatenate(drawn), minlength=25)
    assert counts.min() > 45  # 80 expected, deviation 8
    assert counts.max() < 115


def test_a_lattice_is_exact_for_every_size() -> None:
    for rows, columns in product(range(1, 9), range(1, 9)):
        for k in range(1, rows * columns + 1):
            cells = lattice(rows, columns, k)
            assert len(cells) == k
            assert (np.diff(cells) > 0).all()
            assert 0 <= cells[0] <= cells[-1] < rows * columns


@pytest.mark.parametrize("k", [64, 100, 144, 202, 288, 400])
def test_a_lattice_is_even(k: int) -> None:
    """Each of the nine thirds of a 24 x 24 raster gets its share, to within a row of the lattice."""
    cells = lattice(24, 24, k)
    thirds = np.bincount(cells // 24 // 8 * 3 + cells % 24 // 8, minlength=9)
    assert abs(thirds - k / 9).max() <= np.sqrt(k) / 2


def test_a_quarter_is_every_second_row_and_column() -> None:
    cells = lattice(24, 24, 144)
    assert {(int(c) // 24 % 2, int(c) % 24 % 2) for c in cells} == {(1, 1)}


@pytest.mark.parametrize("k", [18, 36, 108, 216])
def test_the_grid_is_even_beside_padding(k: int) -> None:
    """24 x 24 tokens of which rows 3 to 20 show the picture: never only a few of its columns."""
    given_inputs = inputs([(24, 24)], padding=3)
    kept = METHODS["grid"].select(given_inputs, k)
    across = np.bincount(kept % 24 // 6, minlength=4)
    down = np.bincount((kept // 24 - 3) // 6, minlength=3)
    assert abs(across - k / 4).max() <= np.sqrt(k)
    assert abs(down - k / 3).max() <= np.sqrt(k)


def test_the_grid_is_shared_among_pictures() -> None:
    given_inputs = inputs([(8, 8), (8, 8), (16, 16)])
    kept = METHODS["grid"].select(given_inputs, 96)
    assert list(np.histogram(kept, [0, 64, 128, 384])[0]) == [16, 16, 64]


@pytest.mark.parametrize(
    ("keep", "want"), [(None, 100), (1.0, 100), (0.35, 35), (0.0, 1), (0.001, 1), (0.9, 90), (2.0, 100)]
)
def test_budget(keep: float | None, want: int) -> None:
    assert budget(keep, inputs([(10, 10)])) == want


def test_budget_is_of_all_tokens_but_no_more_than_show_the_picture() -> None:
    given_inputs = inputs([(10, 10)], padding=3)
    assert budget(0.35, given_inputs) == 35
    assert budget(0.6, given_inputs) == 40


@pytest.mark.parametrize(("n", "want"), [(1, 1), (64, 64), (99, 99), (100, 100), (1000, 100)])
def test_budget_in_tokens(n: int, want: int) -> None:
    assert budget(Tokens(n), inputs([(10, 10)])) == want
    assert budget(Tokens(n), inputs([(10, 10)], padding=3)) == min(want, 40)


def auto(saliency: NDArray[np.floating], shown: int = 1000) -> int:
    """Tokens that "auto" keeps of these, the last ``1000 - shown`` of them on padding."""
    return budget("auto", Inputs(1000, np.arange(shown, dtype=np.int32), (None,), (1000,), saliency.astype(np.float32)))


@given(seed=st.integers(0, 99), spread=st.floats(0.5, 12))
def test_auto_keeps_the_fewest_tokens_that_hold_the_share(seed: int, spread: float) -> None:
    saliency = np.random.default_rng(seed).random(1000) ** spread
    k = auto(saliency)
    mass = np.sort(saliency)[::-1].cumsum() / saliency.sum()
    assert 50 <= k <= 640
    assert k == 640 or mass[k - 1] >= AUTO_SHARE - 1e-6
    assert k == 50 or mass[k - 2] < AUTO_SHARE + 1e-6


def test_auto_stays_within_its_bounds() -> None:
    assert auto(np.eye(1, 1000)[0]) == 50
    assert auto(np.ones(1000)) == 640
    assert auto(np.zeros(1000)) == 50
    assert auto(np.ones(1000), shown=300) == round(AUTO_SHARE * 300)
    assert auto(np.ones(1000), shown=20) == 20


def test_auto_needs_a_guide() -> None:
    with pytest.raises(UsageError, match="guide"):
        budget("auto", Inputs(4, np.arange(4, dtype=np.int32), (None,), (4,)))


def test_unknown_methods_are_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'sgl2'.*sgl\+"):
        method_named("sgl2")
    assert all(method_named(name).name == name for name in METHODS)


def test_presets_are_the_paper_s() -> None:
    """Of InternVL2-26B, 48 layers: the mean retention is what the preset is called after."""
    for name, layer, keep in (("paper-64", 19, 0.4), ("paper-35", 9, 0.2), ("paper-9", 2, 0.05)):
        preset = preset_named(name)
        assert (preset.layer_in(48), preset.keep) == (layer, keep)
        mean = mean_kept(((0, 1000), (layer, round(keep * 1000))), 48) / 1000
        assert round(100 * mean) == int(name.split("-")[1])
    with pytest.raises(UsageError, match=r"'paper-50'.*paper-64, paper-35, paper-9"):
        preset_named("paper-50")


@pytest.mark.parametrize(("n_layer", "layers"), [(1, [0, 0, 0]), (2, [1, 1, 1]), (12, [5, 2, 1]), (80, [32, 15, 3])])
def test_a_preset_s_layer_is_one_of_the_model_s(n_layer: int, layers: list[int]) -> None:
    assert [preset.layer_in(n_layer) for preset in PRESETS.values()] == layers


def test_kept_on_average_over_layers() -> None:
    assert mean_kept(((0, 576), (2, 29)), 32) == (2 * 576 + 30 * 29) / 32
    assert mean_kept(((0, 576), (0, 29)), 32) == 29
    assert mean_kept(((0, 576), (2, 300), (6, 100)), 32) == (2 * 576 + 4 * 300 + 26 * 100) / 32


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many stars are there?", "counting"), ("Count the hearts.", "counting"),
        ("What is written on the card?", "reading"), ("Which number is on the card?", "reading"),
        ("Where is the star?", "where"), ("What is to the LEFT of the star?", "where"),
        ("What colour is the star?", OTHER), ("Which country is this, already?", OTHER), ("", OTHER),
    ],
)  # fmt: skip
def test_kinds_of_questions_are_told_by_words(question, kind):
    assert kind_of(question) == kind
    assert floor_of(question) == FLOORS[kind]


def test_a_floor_adds_to_an_auto_budget_alone():
    assert all(AUTO_BOUNDS[0] <= floor <= AUTO_BOUNDS[1] for floor in FLOORS.values())
    n = 100
    sharp = np.zeros(n, np.float32)
    sharp[0] = 1
    for saliency, floor, want in ((sharp, 0.2, 20), (sharp, 0.0, 5), (np.ones(n, np.float32), 0.2, 64)):
        given_ = Inputs(n, np.arange(n, dtype=np.int32), (None,), (n,), saliency, floor=floor)
        assert budget("auto", given_) == want
        assert budget(0.1, given_) == 10
