"""Each method within the LLM against its formula, written out without any care for speed; and its schedule."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from localvlm.pruning.dyvte import Gate, dyvte
from localvlm.pruning.fastv import FASTV
from localvlm.pruning.in_llm import Cut, InLlm, Seen
from localvlm.pruning.pyramiddrop import PYRAMIDDROP
from localvlm.pruning.sparsevlm import SPARSEVLM, SPARSEVLM_V2, clustered, raters

SEEDS = range(8)
SWEEPING = [FASTV, SPARSEVLM, SPARSEVLM_V2, PYRAMIDDROP]


def seen(m: int, seed: int = 0, heads: int = 8, width: int = 24) -> Seen:
    """Hidden rows in clusters, as those of pictures are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, m // 8), width))
    rows = centres[rng.integers(len(centres), size=m)] + 0.3 * rng.normal(size=(m, width))
    attention = rng.random((heads, m)) ** 3 * rng.random((heads, 1))
    text = rng.normal(size=(7, width)).astype(np.float32)
    return Seen(3, attention.astype(np.float32), rows.astype(np.float32), text)


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def head_mean(given: Seen, heads: list[int] | None = None) -> list[float]:
    chosen = range(len(given.attention)) if heads is None else heads
    return [sum(float(given.attention[h, i]) for h in chosen) / len(chosen) for i in range(given.attention.shape[1])]


# selection


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [FASTV, PYRAMIDDROP], ids=lambda m: m.name)
def test_the_last_row_s_attention(method: InLlm, seed: int) -> None:
    given = seen(50 + seed, seed)
    for k in (1, 9, 50):
        kept = method.select(given, k)
        assert kept.rows is None
        assert kept.index.tolist() == sorted(best(head_mean(given), k))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("heads", "looking"), [(32, 14), (8, 4), (6, 3), (2, 1), (1, 1)])
def test_the_heads_that_look_at_the_picture(heads: int, looking: int, seed: int) -> None:
    given = seen(40, seed, heads)
    mass = [math.fsum(map(float, row)) for row in given.attention]
    scores = head_mean(given, best(mass, looking))
    assert SPARSEVLM_V2.select(given, 11).index.tolist() == sorted(best(scores, 11))


@pytest.mark.parametrize("seed", SEEDS)
def test_raters_fit_the_picture_better_than_the_mean(seed: int) -> None:
    given = seen(30 + seed, seed)
    shares = []
    for row in given.rows.astype(float):
        weights = [math.exp(math.fsum(row * word)) for word in given.text.astype(float)]
        shares.append([weight / math.fsum(weights) for weight in weights])
    m = [math.fsum(column) / len(shares) for column in zip(*shares, strict=True)]
    above = [i for i, fit in enumerate(m) if fit > math.fsum(m) / len(m)]
    assert list(raters(given.rows, given.text)) == above


def test_where_no_word_fits_better_all_rate() -> None:
    assert list(raters(np.ones((4, 3), np.float32), np.ones((5, 3), np.float32))) == [0, 1, 2, 3, 4]


def density_peaks(rows: np.ndarray, k: int) -> tuple[list[int], list[list[int]]]:
    """Centres, and the members of their clusters, by the definition in loops. Of two that are as dense, as nearest
    neighbours of each other are at k = 2, the earlier counts as denser (the code tells them apart by noise).
    """
    n = len(rows)
    d = [[math.dist(a, b) / math.sqrt(rows.shape[1]) for b in rows] for a in rows]
    density = [math.exp(-sum(x * x for x in sorted(d[i])[:k]) / k) for i in range(n)]
    furthest = max(map(max, d))
    apart = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (-density[j], j) < (-density[i], i)]
        apart.append(min(denser, default=furthest))
    centres = best([a * p for a, p in zip(apart, density, strict=True)], k)
    members: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        at = centres.index(i) if i in centres else min(range(k), key=lambda c: d[i][centres[c]])
        members[at].append(i)
    return centres, members


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_clusters_have_their_density_peaks_for_centres(seed: int, k: int) -> None:
    rows = seen(31 + seed, seed).rows
    centres, means = clustered(rows, k)
    want, members = density_peaks(rows.astype(np.float64), k)
    assert centres.tolist() == want
    np.testing.assert_allclose(means, [rows[m].mean(axis=0) for m in members], atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_of_the_rest_are_recycled(seed: int) -> None:
    """Of 90 tokens 40 leave: int(0.3 * 40) + 1 = 13 are clustered into 13 // 10 + 1 = 2, and so 52 stay."""
    given = seen(90, seed)
    order = best(head_mean(given), 90)
    pool = order[50:63]
    centres, members = density_peaks(given.rows[pool].astype(np.float64), 2)
    want = {i: given.rows[i] for i in order[:50]}
    for centre, cluster in zip(centres, members, strict=True):
        want[pool[centre]] = np.mean([given.rows[pool[i]] for i in cluster], axis=0)
    kept = SPARSEVLM.select(given, 52)
    assert kept.index.tolist() == sorted(want)
    np.testing.assert_allclose(kept.rows, [want[i] for i in sorted(want)], atol=1e-5)


def test_a_single_token_is_the_most_attended() -> None:
    given = seen(40)
    kept = SPARSEVLM.select(given, 1)
    assert kept.index.tolist() == best(head_mean(given), 1)
    assert kept.rows is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gate_is_two_linear_layers(seed: int) -> None:
    rng, width, wide = np.random.default_rng(seed), 12, 48
    shapes = (wide, 2 * width), (wide,), (2, wide), (2,)
    gates = {layer: Gate(*(rng.normal(size=s).astype(np.float32) for s in shapes)) for layer in range(1, 6)}
    method = dyvte(gates)
    assert method.cuts(0.35, 10, 6) == tuple(Cut(layer, 0) for layer in range(1, 6))
    for layer, gate in gates.items():
        text = rng.normal(size=(5, width)).astype(np.float32)
        x = [math.fsum(column) / len(text) for column in text.T.tolist()] + text[-1].tolist()
        inner = [math.fsum(w * v for w, v in zip(row, x, strict=True)) for row in gate.up.tolist()]
        hidden = [h + b for h, b in zip(inner, gate.up_bias.tolist(), strict=True)]
        gelu = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden]
        logits = [math.fsum(w * g for w, g in zip(row, gelu, strict=True)) for row in gate.down.tolist()]
        logits = [value + bias for value, bias in zip(logits, gate.down_bias.tolist(), strict=True)]
        kept = method.select(Seen(layer, np.ones((2, 10), np.float32), None, text), 0)
        assert kept.index.tolist() == ([] if logits[1] > logits[0] else list(range(10)))


# schedules


def mean_of(cuts: tuple[Cut, ...], n: int, n_layer: int) -> float:
    """Share of n in a layer, over the layers."""
    counts = [n] * n_layer
    for cut in cuts:
        counts[cut.layer :] = [cut.k] * (n_layer - cut.layer)
    return sum(counts) / n_layer / n


@pytest.mark.parametrize("method", SWEEPING, ids=lambda m: m.name)
@pytest.mark.parametrize("n_layer", [2, 4, 12, 28, 32, 48])
@pytest.mark.parametrize("n", [12, 64, 576, 10_000])
def test_the_mean_is_the_one_asked_for(method: InLlm, n_layer: int, n: int) -> None:
    least = mean_of(method.cuts(0.0, n, n_layer), n, n_layer)
    for keep in (0.64, 0.35, 0.2, 0.09):
        cuts = method.cuts(keep, n, n_layer)
        assert mean_of(cuts, n, n_layer) == pytest.approx(max(keep, least), abs=0.5 / n + 1e-9)
        layers, counts = [c.layer for c in cuts], [c.k for c in cuts]
        assert layers == sorted(set(layers))
        assert layers[0] >= 1
        assert layers[-1] < n_layer
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1
        assert counts[0] <= n


@pytest.mark.parametrize("method", SWEEPING, ids=lambda m: m.name)
def test_nothing_leaves_where_nothing_can(method: InLlm) -> None:
    assert method.cuts(1.0, 64, 12) == ()
    assert method.cuts(0.35, 0, 12) == ()
    assert method.cuts(0.35, 64, 1) == ()


def test_a_share_that_is_too_small_gives_the_least() -> None:
    assert FASTV.cuts(0.01, 64, 12) == (Cut(1, 1),)
    assert PYRAMIDDROP.cuts(0.09, 64, 12) == (Cut(3, 1), Cut(6, 1), Cut(9, 1))


def test_the_paper_s_own_schedules() -> None:
    """FastV: K = 2 of 32 and half of 576; PyramidDrop: a half each time; SparseVLM: its tables."""
    assert FASTV.cuts((2 * 576 + 30 * 288) / 32 / 576, 576, 32) == (Cut(2, 288),)
    assert PYRAMIDDROP.cuts((1 + 1 / 2 + 1 / 4 + 1 / 8) / 4, 576, 32) == (Cut(8, 288), Cut(16, 144), Cut(24, 72))
    for mean, table in ((64.375, (66, 34, 20)), (128, (238, 108, 60)), (192.4375, (300, 200, 118))):
        found = SPARSEVLM_V2.cuts(mean / 576, 576, 32)
        assert [c.layer for c in found] == [2, 6, 15]
        assert [c.k for c in found] == pytest.approx(table, abs=1)


def test_merged_tokens_are_counted() -> None:
    """192 of 576: 300 and 9 merged of the 276 that leave, then 200 and 4, then 110 and 3."""
    assert [c.k for c in SPARSEVLM.cuts(192 / 576, 576, 32)] == pytest.approx([309, 204, 113], abs=1)
    kept = SPARSEVLM.select(seen(576), 309)
    assert len(kept.index) == 309
    assert (kept.rows != seen(576).rows[kept.index]).any(axis=1).sum() == 9


# sizes


@pytest.mark.parametrize("method", SWEEPING, ids=lambda m: m.name)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 1), (12, 4), (12, 11), (12, 12)])
def test_few_tokens(method: InLlm, m: int, k: int) -> None:
    kept = method.select(seen(m, m), k).index
    assert len(set(kept.tolist())) == k
    assert kept.tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("method", SWEEPING, ids=lambda m: m.name)
def test_tokens_that_are_all_the_same(method: InLlm) -> None:
    flat = Seen(2, np.ones((4, 90), np.float32), np.ones((90, 8), np.float32))
    assert len(set(method.select(flat, 52).index.tolist())) == 52


@pytest.mark.parametrize("method", SWEEPING, ids=lambda m: m.name)
def test_a_picture_of_ten_thousand_tokens(method: InLlm) -> None:
    given, started = seen(10_000, width=64), time.process_time()
    assert len(set(method.select(given, 900).index.tolist())) == 900
    assert time.process_time() - started < 20
