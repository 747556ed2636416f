"""Each method against its formula, written out without any care for speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from localvlm.pruning import METHODS, Inputs

SEEDS = range(8)
Indices = NDArray[np.int64]


def inputs(n: int, width: int = 24, seed: int = 0, tiles: int = 1) -> Inputs:
    """Features in clusters, as those of pictures are; the first and the last token are padding."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, n // 8), width))
    features = centres[rng.integers(len(centres), size=n)] + 0.4 * rng.normal(size=(n, width))
    return Inputs(
        n=n,
        candidates=np.arange(1, n - 1, dtype=np.int32),
        grids=(None,),
        counts=(n,),
        saliency=rng.random(n).astype(np.float32),
        seed=seed,
        tiles=(np.arange(n) * tiles // n).astype(np.int32),
        features=features.astype(np.float32),
        tower=(rng.random((6, n)) ** 3).astype(np.float32),
        text=rng.normal(size=(9, width)).astype(np.float32),
    )


def cosines(given: Inputs) -> NDArray[np.float64]:
    """(candidates, candidates)."""
    assert given.features is not None
    rows = given.features[given.candidates].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def attended(given: Inputs, layers: slice = slice(-1, None)) -> NDArray[np.float32]:
    assert given.tower is not None
    return given.tower[layers].sum(axis=0)[given.candidates]


def best(scores: NDArray[np.float32], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def fastervlm(given: Inputs, k: int) -> list[int]:
    """Each tile by itself, its share of k rounded so that the shares add up."""
    assert given.tiles is not None
    tile, scores, chosen, before = given.tiles[given.candidates], attended(given), [], 0
    for number in sorted(set(tile.tolist())):
        mine = [i for i in range(len(tile)) if tile[i] == number]
        after = before + len(mine)
        share = round(after * k / len(tile)) - round(before * k / len(tile))
        chosen += [mine[j] for j in best(scores[mine], share)]
        before = after
    return chosen


def vtc_cls(given: Inputs, k: int) -> list[int]:
    assert given.tower is not None
    return best(attended(given, slice(len(given.tower) // 2, None)), k)


def divprune(given: Inputs, k: int) -> list[int]:
    distance = 1 - cosines(given)
    others = distance + np.diag(np.full(len(distance), np.inf))
    chosen = [int(others.min(axis=1).argmax())]
    while len(chosen) < k:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def cdpruner(given: Inputs, k: int) -> list[int]:
    assert given.features is not None
    assert given.text is not None
    rows, text = given.features[given.candidates].astype(np.float64), given.text.mean(axis=0)
    near = rows @ text / np.linalg.norm(rows, axis=1) / np.linalg.norm(text)
    near = np.maximum((near - near.min()) / (near.max() - near.min()), 1e-6)
    kernel = near[:, None] * cosines(given) * near
    chosen: list[int] = []
    while len(chosen) < k:
        left = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
    return chosen


def scope(given: Inputs, k: int) -> list[int]:
    similar, weight = np.maximum(cosines(given), 0), attended(given)
    covered, chosen = np.zeros(len(weight)), []
    for _ in range(k):
        gain = weight * np.maximum(similar - covered, 0).sum(axis=1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        covered = np.maximum(covered, similar[chosen[-1]])
    return chosen


def vispruner(given: Inputs, k: int) -> list[int]:
    similar = cosines(given)
    order = best(attended(given), len(similar))
    chosen, rest = order[: round(k / 2)], order[round(k / 2) :]
    while len(chosen) + len(rest) > k:
        even, odd = rest[::2], rest[1::2]
        closest = [max(similar[i][odd]) for i in even]
        drop = sorted(range(len(even)), key=lambda j: (-closest[j], j))
        gone = min(8, len(chosen) + len(rest) - k)
        rest = [even[j] for j in drop[gone:]] + odd
    return chosen + rest


Averaged = tuple[list[int], NDArray[np.float64]]


def tome(given: Inputs, k: int) -> Averaged:
    """Token by token, with the members of each group kept in a list."""
    assert given.features is not None
    groups, places = [[int(i)] for i in given.candidates], list(range(len(given.candidates)))
    mean = lambda g: given.features[g].astype(np.float64).mean(axis=0)  # noqa: E731
    while len(groups) > k:
        rows = np.array([mean(g) for g in groups])
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        a, b = list(range(0, len(groups), 2)), list(range(1, len(groups), 2))
        to = {i: max(b, key=lambda j: unit[i] @ unit[j]) for i in a}
        gone = sorted(a, key=lambda i: -(unit[i] @ unit[to[i]]))[: len(groups) - k]
        for i in gone:
            groups[to[i]] += groups[i]
        stays = [i for i in range(len(groups)) if i not in gone]
        groups, places = [groups[i] for i in stays], [places[i] for i in stays]
    return places, np.array([mean(g) for g in groups])


def visionzip(given: Inputs, k: int) -> Averaged:
    """Ten of 64 stand for others."""
    assert given.features is not None
    others = round(10 * k / 64) if k < len(given.candidates) else 0
    order = best(attended(given), len(given.candidates))
    rest = sorted(order[k - others :])
    targets = [rest[i * len(rest) // others] for i in range(others)]
    similar, groups = cosines(given), {t: [t] for t in targets}
    for i in set(rest) - set(targets) if targets else ():
        groups[max(targets, key=lambda t: similar[i, t])].append(i)
    want = sorted(order[: k - others] + targets)
    rows = given.features[given.candidates].astype(np.float64)
    return want, np.array([rows[groups.get(i, [i])].mean(axis=0) for i in want])


REFERENCES: dict[str, Callable[[Inputs, int], list[int]]] = {
    "fastervlm": fastervlm, "vtc-cls": vtc_cls, "divprune": divprune, "cdpruner": cdpruner, "scope": scope,
    "vispruner": vispruner,
}  # fmt: skip
AVERAGING: dict[str, Callable[[Inputs, int], Averaged]] = {"tome": tome, "visionzip": visionzip}


FROM_FEATURES = [m for m in METHODS.values() if m.needs and m.shapes is None]
"""Those that are trained have tests of their own (tests/unit/test_trained.py)."""


def check(name: str, given: Inputs, k: int) -> None:
    """Whether a method keeps the tokens of its formula, and the rows that stand in their places."""
    if name in REFERENCES:
        want = np.sort(given.candidates[REFERENCES[name](given, k)])
        np.testing.assert_array_equal(METHODS[name].select(given, k), want)
        return
    average = METHODS[name].average
    assert average is not None
    places, rows = AVERAGING[name](given, k)
    kept = average(given, k)
    np.testing.assert_array_equal(kept.index, given.candidates[places])
    assert kept.rows is not None
    np.testing.assert_allclose(kept.rows, rows, atol=2e-5 * np.abs(rows).max())


def test_every_method_that_needs_no_guide_has_a_reference() -> None:
    assert {*REFERENCES, *AVERAGING} == {m.name for m in FROM_FEATURES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*REFERENCES, *AVERAGING])
def test_the_same_tokens_as_the_formula(name: str, seed: int) -> None:
    given = inputs(50 + seed, seed=seed, tiles=1 + seed % 4)
    for k in (1, 2, 9, 20) if name in REFERENCES else (2, 19, 30, 40):  # of more than 24 the determinant is 0
        check(name, given, k)


@pytest.mark.parametrize("method", FROM_FEATURES, ids=lambda m: m.name)
@pytest.mark.parametrize(("n", "k"), [(3, 1), (12, 4), (12, 10)])
def test_pictures_of_few_tokens(method, n: int, k: int) -> None:
    given = inputs(n, seed=n)
    kept = method.select(given, min(k, n - 2))
    assert len(set(kept.tolist())) == min(k, n - 2)
    assert np.isin(kept, given.candidates).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", FROM_FEATURES, ids=lambda m: m.name)
def test_a_picture_of_ten_thousand_tokens(method) -> None:
    kept = method.select(inputs(10_000, width=64), 900)
    assert len(set(kept.tolist())) == 900


@pytest.mark.parametrize("method", FROM_FEATURES, ids=lambda m: m.name)
def test_tokens_that_are_all_the_same(method) -> None:
    """No token is chosen twice and nothing divides by zero."""
    given = inputs(30)
    flat = replace(given, features=np.ones((30, 8), np.float32), tower=np.ones((4, 30), np.float32))
    for features in (flat.features, np.zeros((30, 8), np.float32)):
        kept = method.select(replace(flat, features=features, text=np.ones((3, 8), np.float32)), 12)
        assert len(set(kept.tolist())) == 12
