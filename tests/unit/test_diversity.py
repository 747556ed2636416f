"""Ways of choosing tokens that differ from each other, as ``python -m tests.diversity`` compares them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diversity import WAYS, dpp, facility, mmr, picked


@pytest.mark.parametrize("name", WAYS)
def test_twins_are_not_both_chosen(name: str) -> None:
    """Tokens 0 and 1 are the same and most attended to; 2 shows something else."""
    rows = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.1, 1]], np.float32)
    saliency = np.array([1.0, 0.99, 0.9, 0.0], np.float32)
    found = picked(saliency, rows, 2)
    assert found["attention"].tolist() == [0, 1]
    assert found[name].tolist() == [0, 2]
    assert found[name].dtype == np.int32
    assert sorted(picked(saliency, rows, 4)[name]) == [0, 1, 2, 3]


def test_greedy_sets_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike, relevance = np.maximum(rows @ rows.T, 0), rng.random(9) + 0.1
    kernel = relevance[:, None] * alike * relevance

    def best(value) -> list[int]:
        out: list[int] = []
        for _ in range(4):
            out.append(max(set(range(9)) - set(out), key=lambda i: value([*out, i]) - (value(out) if out else 0)))
        return out

    assert dpp(relevance, alike, 4) == best(lambda s: np.linalg.slogdet(kernel[np.ix_(s, s)])[1])
    covered = lambda s: alike[s].max(axis=0) if s else np.zeros(9)  # noqa: E731
    out: list[int] = []
    for _ in range(4):
        gains = [relevance[i] * np.maximum(alike[i] - covered(out), 0).sum() * (i not in out) for i in range(9)]
        out.append(int(np.argmax(gains)))
    assert facility(relevance, alike, 4) == out
    assert mmr(1.0)(relevance, alike, 3) == np.argsort(-relevance)[:3].tolist()
